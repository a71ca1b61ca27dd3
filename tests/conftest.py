import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--solution", help="your solutions of docs/exercises.md, a Python file")
