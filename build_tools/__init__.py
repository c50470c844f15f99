"""How csrc/ becomes libraries: what setup.py, the build backend and the scripts of .ci/ share."""
