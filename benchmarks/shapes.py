"""The shapes that are measured: real students and their teachers."""

from typing import NamedTuple


class Shape(NamedTuple):
    """What a loss sees of a student and its teacher."""

    model: str
    vocab: int
    hidden: int  # of the student
    teacher_hidden: int
    dtype: str  # in which such models are trained


MODELS = (
    Shape("digits", 10, 32, 128, "float32"),
    Shape("DistilBERT from BERT-base", 30_522, 768, 768, "float32"),
    Shape("Llama-3.2 1B from Llama-3.1 8B", 128_256, 2048, 4096, "bfloat16"),
    Shape("Qwen3 0.6B from Qwen3 8B", 151_936, 1024, 4096, "bfloat16"),
    Shape("Gemma-3 1B from Gemma-3 4B", 262_144, 1152, 2560, "bfloat16"),
)
MEMORY_MODEL = MODELS[2]  # whose memory is plotted against tokens

TOKENS = (1024, 2048, 4096, 8192, 16_384, 32_768)
FEWER_TOKENS = (64, 128, 256, 512)  # where memory or time allow no more
TOP_K = 64

QUICK = Shape("quick", 1024, 64, 96, "float32")
QUICK_TOKENS = (64, 128)

# The budgets' own shapes: two logits arrays, and a head on both sides.
BUDGET_TOKENS, BUDGET_VOCAB = 1024, 32_768
BUDGET_HEAD_TOKENS, BUDGET_HEAD_HIDDEN, BUDGET_HEAD_VOCAB = 4096, 512, 32_768
# Three decades of one float32 logits array: 1 MiB to 1 GiB.
SCALING_TOKENS = tuple((64 * 4**i, 4096) for i in range(6))
SCALING_VOCAB = tuple((256, 1024 * 4**i) for i in range(6))
