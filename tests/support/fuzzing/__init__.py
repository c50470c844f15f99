"""Random calls of everything public, against the reference and "an error changes nothing".

`values.py` describes arguments as plain data and makes them; `mistakes.py` spoils them;
`drivers.py` and `public.py` know the arguments of ops and of other functions, `worlds.py` and
`machines.py` the sequences of calls of a method; `calls.py` makes a call and `judging.py` says what
is wrong with it; `targets.py` lists all that there is; `program.py` is `make fuzz`.
"""
