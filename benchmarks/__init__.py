"""Time, memory and accuracy of kljax beside what people use instead: `python -m benchmarks --help`.

shapes.py    the real models whose shapes are measured
cases.py     one case: what is computed, on which arrays, and the least it can cost
peers.py     the contenders in JAX;  torch_peers.py  those in torch
runner.py    compiles, calls in turn, times
reference.py the gradient in NumPy float64
budgets.py   the bounds that the library holds itself to
accelerators.py what programs for TPU and NVIDIA move through memory, without either
targets.py   the devices to compile for;  hlo.py  the counter of bytes
report.py    JSON, Markdown and plots
"""
