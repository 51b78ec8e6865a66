"""Time, memory and accuracy of kljax beside what people use instead: `python -m benchmarks --help`.

shapes.py    the real models whose shapes are measured
cases.py     one case: what is computed, on which arrays, and the least it can cost
peers.py     the contenders in JAX;  torch_peers.py  those in torch
runner.py    compiles, calls in turn, times
reference.py the gradient in NumPy float64
budgets.py   the bounds that the library holds itself to
tpu_bytes.py what the TPU compiler says, without a TPU
report.py    JSON, Markdown and plots
"""
