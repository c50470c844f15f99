"""A batch that is wrong on one rank only: every rank raises, at once, and can go on."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from balancing import KINDS, METHODS_OF, arguments, balance, make, see, show
from parallel import CLASSES
from ranks import ranks

import mmfuse
