"""The contenders in torch, where it is installed: eager, compiled, and Liger-Kernel's kernels.

Imported by name, for none of these is a dependency. On a GPU torch shares it with JAX; without one
both have all cores.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.cases import Case, Inputs
from benchmarks.peers import Contender, Loss


def contenders() -> list[Contender]:
    """Those that can run here on the device that JAX uses."""
    if importlib.util.find_spec("torch") is None:
        return []
    torch = importlib.import_module("torch")
    platform = jax.default_backend()
    if platform not in ("cpu", "gpu") or (platform == "gpu" and not torch.cuda.is_available()):
        return []
    torch.set_num_threads(os.cpu_count() or 1)
    found = [
        Contender("torch eager", eager, torch=True),
        Contender("torch.compile", compiled, torch=True),
    ]
    if platform == "gpu" and importlib.util.find_spec("liger_kernel") is not None:
        found += [
            Contender("Liger", liger, torch=True),
            Contender("Liger fused linear KL", liger_fused_linear_kl, torch=True),
        ]
    return found


def prepare(case: Case, loss: Loss, given: Inputs) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Value, and value with the gradients to the student, of the arrays that JAX holds."""
    torch = importlib.import_module("torch")

    def tensors(arrays: tuple[Any, ...], head: bool) -> tuple[Any, ...]:
        same = tuple(torch.from_dlpack(x) for x in arrays)
        # A kernel [H, V] as torch keeps the weight of a linear layer, [V, H].
        return (same[0], same[1].T.contiguous()) if head else same

    student = tuple(x.detach().requires_grad_() for x in tensors(given.student, case.has_head))
    teacher = tensors(given.teacher, case.kind == "head")

    def wait() -> None:
        if student[0].is_cuda:
            torch.cuda.synchronize()

    def value() -> Any:
        with torch.no_grad():
            result = loss(student, teacher)
        wait()
        return result

    def value_and_grad() -> Any:
        for leaf in student:
            leaf.grad = None
        loss(student, teacher).backward()
        wait()
        first, *kernel = (leaf.grad for leaf in student)
        return first, *(weight.T for weight in kernel)

    return value, value_and_grad


def gathered(gradient: Any, index: list[int], axis: int) -> Any:
    """Some rows, or columns, of a gradient, as NumPy float64."""
    torch = importlib.import_module("torch")
    chosen = gradient.index_select(axis, torch.tensor(index, device=gradient.device))
    return chosen.double().cpu().numpy()


# --- torch itself ---


def eager(case: Case) -> Loss:
    """`torch.nn.functional.kl_div` on log-probabilities, in the dtype of its inputs."""
    torch = importlib.import_module("torch")

    def kl(log_p: Any, log_q: Any) -> Any:
        return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def loss(student: tuple[Any, ...], teacher: tuple[Any, ...]) -> Any:
        log_q, log_p = _log_probs(torch, case, student, teacher)
        if case.divergence == "forward_kl":
            return kl(log_p, log_q)
        if case.divergence == "reverse_kl":
            return kl(log_q, log_p)
        log_m = torch.log((log_p.exp() + log_q.exp()) / 2)
        return (kl(log_p, log_m) + kl(log_q, log_m)) / 2

    return loss


def compiled(case: Case) -> Loss:
    """The same through torch.compile, with its defaults."""
    torch = importlib.import_module("torch")
    torch._dynamo.reset()  # or the sizes seen so far make it compile for any size
    return torch.compile(eager(case))


def _logits(torch: Any, given: tuple[Any, ...]) -> Any:
    return given[0] if len(given) == 1 else torch.nn.functional.linear(*given)


def _log_probs(
    torch: Any, case: Case, student: tuple[Any, ...], teacher: tuple[Any, ...]
) -> tuple[Any, Any]:
    log_softmax = torch.nn.functional.log_softmax
    if not case.has_top_k:
        return tuple(log_softmax(_logits(torch, x), dim=-1) for x in (student, teacher))
    indices, best, tail = teacher
    # In float32, for the rest of the mass is lost in 16 bits.
    log_q = log_softmax(_logits(torch, student), dim=-1, dtype=torch.float32)
    picked = log_q.gather(-1, indices.long())
    rest = torch.log1p(-picked.exp().sum(-1, keepdim=True))
    return torch.cat([picked, rest], -1), torch.cat([best, tail[:, None]], -1)


# --- Liger-Kernel, on NVIDIA GPUs ---

_LIGER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}


def liger(case: Case) -> Loss | None:
    """`LigerKLDIVLoss` or `LigerJSD` on log-probabilities; `LigerFusedLinearJSD` for a head."""
    torch = importlib.import_module("torch")
    kernels = importlib.import_module("liger_kernel.transformers")
    beta = _LIGER_BETA[case.divergence]
    if case.has_top_k:
        return None
    if case.has_head:
        fused = kernels.LigerFusedLinearJSD(jsd_beta=beta)
        return lambda student, teacher: fused(*student, *teacher, None)
    if case.divergence == "forward_kl":
        each = kernels.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        each = kernels.LigerJSD(beta=beta)
    return lambda student, teacher: each(*_log_probs(torch, case, student, teacher))


def liger_fused_linear_kl(case: Case) -> Loss | None:
    """`LigerFusedLinearKLDivLoss`, which takes the teacher's probabilities, not its head."""
    torch = importlib.import_module("torch")
    kernels = importlib.import_module("liger_kernel.transformers")
    # Merged in 2026-09: older releases lack it.
    make = getattr(kernels, "LigerFusedLinearKLDivLoss", None)
    if make is None or case.kind != "head" or case.divergence != "forward_kl":
        return None
    fused = make()
    return lambda student, teacher: fused(*student, _logits(torch, teacher).softmax(-1))
