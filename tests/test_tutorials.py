"""What five well-known KL tutorials compute, in kljax's terms, and their pitfalls.

The numbers are those of the real systems (data/tutorials.json). Each call is written as a user of
kljax would write it; where a tutorial is wrong, the test says what happens here instead.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import report, tol

import kljax
from kljax import LogProbs, Probs

pytestmark = pytest.mark.slow

FILE = pathlib.Path(__file__).parent / "data" / "tutorials.json"
CASES = {case["id"]: case for case in json.loads(FILE.read_text())["cases"]}

# The other systems' own float32 rounding, and the epsilon of 1e-12 that MXNet adds to a target.
PUBLISHED = {"rtol": 2e-5, "atol": 1e-6}


def ids(prefix):
    """Return the ids of the cases of one tutorial, or of one part of it."""
    return [name for name in CASES if name.startswith(prefix)]


def array(stored):
    """Return a stored array, or a plain list, as float32; non-finite numbers are strings there."""
    if isinstance(stored, dict):
        data = [float(x) for x in stored["data"]]
        return np.array(data, np.float32).reshape(stored["shape"])
    return np.array([float(x) for x in stored], np.float32)


def log(probs):
    """Return log-probabilities as a careful user takes them: log 0 = -inf, without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(probs)


def torch_kl_div(case):
    """Return F.kl_div(input, target, reduction=…, log_target=…) written in kljax."""
    predictions = LogProbs(array(case["input"]))
    targets = (LogProbs if case["log_target"] else Probs)(array(case["target"]))
    if case["reduction"] == "none":
        return kljax.kl_terms(targets, predictions, axis=-1)
    return kljax.forward_kl(predictions, targets, reduction=case["reduction"])


def oracle_kl_div(case):
    """Return the same from the oracle."""
    kinds = ("log_probs", "log_probs" if case["log_target"] else "probs")
    sides = array(case["input"]), array(case["target"])
    if case["reduction"] == "none":
        logs = [oracle.log_probs(x, kind) for x, kind in zip(sides, kinds, strict=True)]
        return oracle.kl_terms(logs[1], logs[0])
    values = oracle.divergence("forward_kl", *sides, kinds=kinds)
    return oracle.reduce(values, reduction=case["reduction"])


# --- the numbers ---


@pytest.mark.parametrize("name", ids("t000/") + ids("t001/ex2") + ids("t001/ex3"))
def test_torch_calls_have_their_numbers(name):
    """Sum, batchmean and the elementwise terms are torch's, with typed distributions."""
    case = CASES[name]
    got = torch_kl_div(case)
    np.testing.assert_allclose(got, oracle_kl_div(case), **tol(np.float32))
    np.testing.assert_allclose(got, array(case["expected"]), **PUBLISHED)


@pytest.mark.parametrize("name", ids("t000/"))
def test_notebook_prints_agree_within_their_rounding(name):
    """What the notebook printed follows from its inputs, rounded to four decimals as they are."""
    case = CASES[name]
    got = np.ravel(torch_kl_div(case))
    bound = np.ravel(array(case["rounding_bound"]))
    for key, printing in (
        ("tutorial_printed_4dp", 5e-5),
        ("tutorial_printed_full", 5e-5),  # one of them has four digits only
        ("tutorial_printed_library_value", 0.0),
    ):
        printed = np.array(case.get(key, []))
        shown = slice(0, printed.size)  # a long array is printed in part: its beginning
        float32 = PUBLISHED["atol"]
        assert (np.abs(got[shown] - printed) <= bound[shown] + printing + float32).all()


def test_torchmetrics_divergence_is_in_formula_order():
    """KLDivergence()(p, q) is kl(p, q), and the reverse is the other way round."""
    case = CASES["t001/ex1_torchmetrics"]
    p, q = Probs(array(case["p"])), Probs(array(case["q"]))
    got = kljax.kl(p, q, reduction="mean")
    np.testing.assert_allclose(got, case["expected_float64"]["data"][0], **PUBLISHED)
    np.testing.assert_allclose(got, array(case["expected"]), **PUBLISHED)
    assert f"{got:.4f}" in case["upstream_doc_prints"]
    np.testing.assert_allclose(
        kljax.kl(q, p, reduction="mean"), array(case["expected_reverse"]), **PUBLISHED
    )


def test_divergence_is_cross_entropy_minus_entropy():
    """D(t‖s) = H(t, s) - H(t), with the three numbers of the tutorial."""
    case = CASES["t001/ex4_ce_minus_entropy"]
    s, t = array(case["logits_input"])[None], array(case["logits_target"])
    cross = kljax.cross_entropy(s, kljax.Logits(t), reduction="mean")
    entropy = kljax.entropy(t, reduction="mean")
    divergence = kljax.forward_kl(s, t, reduction="mean")
    np.testing.assert_allclose(cross, array(case["cross_entropy"]), **PUBLISHED)
    np.testing.assert_allclose(entropy, array(case["entropy"]), **PUBLISHED)
    np.testing.assert_allclose(divergence, array(case["expected_with_2d_input"]), **PUBLISHED)
    np.testing.assert_allclose(cross - entropy, divergence, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ids("t002/"))
def test_softmax_over_the_first_axis_is_axis_0(name):
    """Distributions that are columns are named by axis=0; then "mean" is theirs."""
    case = CASES[name]
    s, t = array(case["logits_input"]), array(case["logits_target"])
    terms = kljax.kl_terms(kljax.Logits(t), kljax.Logits(s), axis=0)
    np.testing.assert_allclose(terms, array(case["expected_none"]), **PUBLISHED)
    total = kljax.forward_kl(s, t, axis=0, reduction="sum")
    np.testing.assert_allclose(total, array(case["expected"]["sum"]), **PUBLISHED)
    # torch divides the same sum by rows ("batchmean") or by all elements ("mean").
    np.testing.assert_allclose(total / len(s), array(case["expected"]["batchmean"]), **PUBLISHED)
    np.testing.assert_allclose(total / s.size, array(case["expected"]["mean"]), **PUBLISHED)
    for key, value in case["tutorial_printed"].items():
        np.testing.assert_allclose(array(case["expected"][key]), value, rtol=0, atol=6e-5)
    columns = array(case["mean_kl_per_column_distribution"])
    np.testing.assert_allclose(
        kljax.forward_kl(s, t, axis=0, reduction="mean"), columns, **PUBLISHED
    )
    np.testing.assert_allclose(
        kljax.forward_kl(s, t, reduction="batchmean"),
        array(case["batchmean_with_softmax_on_last_axis"]),
        **PUBLISHED,
    )


@pytest.mark.parametrize("name", ids("t002/"))
def test_given_log_probabilities_are_their_logits(name):
    """The tutorial's log_softmax and softmax arrays give what its logits give."""
    case = CASES[name]
    given = kljax.forward_kl(
        LogProbs(array(case["input"])), Probs(array(case["target"])), axis=0, reduction="sum"
    )
    np.testing.assert_allclose(given, array(case["expected"]["sum"]), **PUBLISHED)


@pytest.mark.parametrize("name", [n for n in ids("t003/") if n not in ("t003/d44",)])
def test_gluon_calls_have_their_numbers(name):
    """Gluon's loss is D(label‖pred); its mean convention divides by the number of classes."""
    case = CASES[name]
    if name == "t003/true_divergence":
        case = {**CASES["t003/d12"], "expected_sum_convention": case["expected"]}
    pred, label = array(case["pred"]), array(case["label"])
    predictions = LogProbs(log(pred)) if case["from_logits"] else pred
    got = kljax.forward_kl(predictions, Probs(label))
    np.testing.assert_allclose(got, float(case["expected_sum_convention"]), **PUBLISHED)
    mean = float(case["expected_mean_convention"])
    np.testing.assert_allclose(got / label.size, mean, **PUBLISHED)
    want = oracle.divergence(
        "forward_kl", pred, label, kinds=("probs" if case["from_logits"] else "logits", "probs")
    )
    np.testing.assert_allclose(got, want, **tol(np.float32))


def test_gluon_factor_is_the_number_of_classes():
    """The mean convention is a quarter of the divergence of four classes, the sum is all of it."""
    case = CASES["t003/true_divergence"]
    pair = CASES["t003/d12"]
    got = kljax.forward_kl(Probs(array(pair["pred"])), Probs(array(pair["label"])))
    systems = case["divergence_times_num_categories"]
    np.testing.assert_allclose(got, systems["mxnet 1.8.0"], **PUBLISHED)
    np.testing.assert_allclose(4 * got, systems["mxnet 1.9.1"], **PUBLISHED)


# --- the pitfalls ---


def test_zero_over_zero_is_zero_where_other_systems_say_nan():
    """A class that neither side has contributes 0, in value and gradient."""
    case = CASES["t003/d44"]
    pred, label = array(case["pred"]), array(case["label"])
    assert math.isnan(float(case["expected_sum_convention"]))
    value, gradient = jax.value_and_grad(lambda x: kljax.forward_kl(LogProbs(x), Probs(label)))(
        log(pred)
    )
    np.testing.assert_allclose(value, 0.0, **tol(np.float32))
    np.testing.assert_allclose(gradient, -label, **tol(np.float32))
    np.testing.assert_array_equal(kljax.kl_terms(Probs(label), LogProbs(log(pred)), axis=-1)[0], 0)


def test_missing_prediction_is_infinite():
    """Mass of the target where the prediction has none is +inf, not NaN and not clipped."""
    case = CASES["t003/d41"]
    pred, label = array(case["pred"]), array(case["label"])
    assert kljax.forward_kl(LogProbs(log(pred)), Probs(label)) == np.inf
    assert kljax.forward_kl(Probs(pred), Probs(label)) == np.inf
    assert kljax.forward_kl(log(pred), Probs(label)) == np.inf
    assert kljax.reverse_kl(Probs(pred), Probs(label)) < np.inf


@pytest.mark.parametrize("name", ["t003/d12", "t003/d13", "t003/d21"])
def test_swapping_arguments_is_the_other_direction(name):
    """The direction is in the name: the swapped call is the reverse divergence, never garbage."""
    case = CASES[name]
    a, b = array(case["pred"]), array(case["label"])
    forward = kljax.forward_kl(LogProbs(log(a)), Probs(b))
    swapped = kljax.forward_kl(Probs(b), LogProbs(log(a)))
    np.testing.assert_allclose(
        forward, oracle.divergence("kl", b, a, kinds=("probs",) * 2), **tol(np.float32)
    )
    np.testing.assert_allclose(
        swapped, oracle.divergence("kl", a, b, kinds=("probs",) * 2), **tol(np.float32)
    )
    np.testing.assert_allclose(
        swapped, kljax.reverse_kl(LogProbs(log(a)), Probs(b)), **tol(np.float32)
    )
    np.testing.assert_allclose(forward, kljax.kl(Probs(b), Probs(a)), **tol(np.float32))
    assert abs(float(forward) - float(swapped)) > 1e-4


def test_named_arguments_may_stand_in_any_order():
    """Predictions and targets can be named."""
    case = CASES["t003/d13"]
    s, t = Probs(array(case["pred"])), Probs(array(case["label"]))
    np.testing.assert_array_equal(
        kljax.forward_kl(targets=t, predictions=s), kljax.forward_kl(s, t)
    )


@pytest.mark.parametrize("option", ["log_target", "from_logits", "size_average"])
def test_representation_flags_do_not_exist(option):
    """What an array holds is its type's business: a flag for it is refused."""
    x = jnp.zeros((2, 3))
    with pytest.raises(TypeError):
        kljax.forward_kl(x, x, **{option: True})


def test_options_are_keyword_only():
    """A third positional argument, torch's size_average or reduction, is refused."""
    x = jnp.zeros((2, 3))
    with pytest.raises(TypeError):
        kljax.forward_kl(x, x, "batchmean")


def test_probabilities_taken_for_log_probabilities_are_reported():
    """-1.10352 came from probabilities passed as log-probabilities: checkify says so."""
    case = CASES["t004/pitfall2"]
    probs = array(case["input"])

    def mistaken(x):
        return kljax.forward_kl(LogProbs(x), Probs(array(case["target"])), reduction="batchmean")

    def both_mistaken(x):
        return kljax.forward_kl(LogProbs(x), LogProbs(x), reduction="batchmean")

    # Taken at their word the numbers are the tutorial's own.
    np.testing.assert_allclose(
        mistaken(probs), array(case["expected_log_target_false"]), **PUBLISHED
    )
    np.testing.assert_allclose(
        both_mistaken(probs), array(case["expected_log_target_true"]), **PUBLISHED
    )
    assert report(mistaken, probs)
    assert report(both_mistaken, probs)


def test_correct_calls_are_not_reported():
    """The same call with the logarithm taken is 0 and passes every check."""
    case = CASES["t004/pitfall2"]
    probs = array(case["input"])

    def correct(x):
        return kljax.forward_kl(
            LogProbs(jnp.log(x)), Probs(array(case["target"])), reduction="batchmean"
        )

    np.testing.assert_allclose(
        correct(probs), array(case["correct_call_log_input"]), **tol(np.float32)
    )
    assert report(correct, probs) is None


def test_zero_of_a_wrong_call_is_vacuous_and_reported():
    """Probabilities in the place of both log-probabilities look like 0 or less than 0."""
    case = CASES["t004/pitfall2_counterexample"]
    t, s = array(case["target"]), array(case["input"])

    def wrong(s, t):
        return kljax.forward_kl(LogProbs(s), LogProbs(t), reduction="batchmean")

    wrongs = [
        (s, t, case["wrong_log_target_true_on_probs"]),
        *(
            (array(c["input"]), array(c["target"]), c["value"])
            for c in (case["wrong_zero_for_different_distributions"], case["wrong_negative"])
        ),
    ]
    for s_wrong, t_wrong, value in wrongs:
        np.testing.assert_allclose(wrong(s_wrong, t_wrong), array(value), **PUBLISHED)
        assert report(wrong, s_wrong, t_wrong)

    for right, key in (
        (kljax.forward_kl(Probs(s), Probs(t), reduction="batchmean"), "correct_kl"),
        (wrong(log(s), log(t)), "correct_kl_log_target"),
    ):
        np.testing.assert_allclose(right, array(case[key]), **PUBLISHED)


def test_log_probabilities_in_the_place_of_probabilities_are_reported():
    """The call that a tutorial names correct has its types swapped: that is reported."""
    case = CASES["t004/pitfall3"]
    probs, log_probs = array(case["softmax"]), array(case["log_softmax"])

    def wrong(x, t):
        return kljax.forward_kl(LogProbs(x), Probs(t), reduction="batchmean")

    def vacuous(x):
        return kljax.forward_kl(LogProbs(x), LogProbs(x), reduction="batchmean")

    def bare(x):
        return kljax.forward_kl(x, Probs(probs), reduction="batchmean")

    def logits(x):
        return bare(kljax.Logits(x))

    assert report(wrong, probs, log_probs)
    assert report(vacuous, probs)
    np.testing.assert_allclose(vacuous(probs), case["expected"][2], **PUBLISHED)
    # The documented order, and the same from raw logits, is zero and passes.
    np.testing.assert_allclose(wrong(log_probs, probs), case["expected"][1], **PUBLISHED)
    np.testing.assert_allclose(bare(array(case["logits"])), 0.0, **PUBLISHED)
    assert report(wrong, log_probs, probs) is None
    # These logits happen to be positive and to sum to 1: only their type tells what they are.
    assert report(bare, array(case["logits"]))
    assert report(logits, array(case["logits"])) is None


def test_bare_probabilities_as_predictions_are_reported():
    """A bare array is logits; one that looks like probabilities is reported."""
    case = CASES["t003/d12"]
    pred, label = array(case["pred"]), array(case["label"])

    def mistaken(x):
        return kljax.forward_kl(x, Probs(label))

    assert report(mistaken, pred)
    assert report(mistaken, array(CASES["t003/not_from_logits_d12"]["pred"])) is None


@pytest.mark.parametrize("reduction", ["elementwise_mean", "average", "batch_mean", "None", ""])
def test_unknown_reduction_raises(reduction):
    """No unknown reduction means "none"."""
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="reduction"):
        kljax.forward_kl(x, x, reduction=reduction)


def test_vector_against_a_batch_of_one_is_one_example():
    """A side without a batch is shared: (4,) against (1, 4) divides by 1, not by 4."""
    case = CASES["t001/ex4_ce_minus_entropy"]
    s, t = LogProbs(array(case["input"])), Probs(array(case["target"]))
    per_example = kljax.forward_kl(s, t)
    assert per_example.shape == (1,)
    got = kljax.forward_kl(s, t, reduction="batchmean")
    np.testing.assert_allclose(got, array(case["expected_with_2d_input"]), **PUBLISHED)
    np.testing.assert_allclose(got / 4, array(case["expected"]), **PUBLISHED)


@pytest.mark.parametrize(
    ("s", "t"),
    [((1, 4), (3, 4)), ((3, 1), (3, 4)), ((2, 3, 4), (3, 4)), ((3, 4), (3, 5)), ((1,), (4,))],
)
def test_nothing_else_broadcasts(s, t):
    """Batch shapes are equal or one side has none at all; the classes match exactly."""
    with pytest.raises(ValueError, match="forward_kl"):
        kljax.forward_kl(jnp.zeros(s), jnp.zeros(t))
    with pytest.raises(ValueError, match="forward_kl"):
        kljax.forward_kl(jnp.zeros(t), jnp.zeros(s))


def test_batchmean_divides_by_the_leading_axis_only():
    """For [batch, tokens, classes] batchmean sums the tokens; "mean" is per token."""
    case = CASES["t000/loss_6"]
    s, t = LogProbs(array(case["input"])), Probs(array(case["target"]))
    per_token = kljax.forward_kl(s, t)
    assert per_token.shape == (2, 2)
    np.testing.assert_allclose(
        kljax.forward_kl(s, t, reduction="batchmean"), per_token.sum() / 2, **tol(np.float32)
    )
    np.testing.assert_allclose(
        kljax.forward_kl(s, t, reduction="mean"), per_token.sum() / 4, **tol(np.float32)
    )


@pytest.mark.parametrize("name", ids("t002/"))
def test_softmax_over_another_axis_is_reported(name):
    """Arrays normalised along one axis and used along another are not distributions."""
    case = CASES[name]
    s, t = array(case["input"]), array(case["target"])

    def along(axis):
        return lambda s, t: kljax.forward_kl(LogProbs(s), Probs(t), axis=axis, reduction="mean")

    assert report(along(-1), s, t)
    assert report(along(0), s, t) is None


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_no_reduction_averages_over_classes(reduction):
    """More classes that cannot happen change nothing: the number of classes divides nothing."""
    case = CASES["t001/ex2_batchmean_seed0"]
    s, t = array(case["input"]), array(case["target"])
    few = kljax.forward_kl(s, Probs(t), reduction=reduction)
    wide = [(0, 0), (0, 7)]
    many = kljax.forward_kl(
        np.pad(s, wide, constant_values=-np.inf), Probs(np.pad(t, wide)), reduction=reduction
    )
    np.testing.assert_allclose(many, few, **tol(np.float32))


def test_elementwise_mean_has_to_be_spelled_out():
    """What torch calls "mean" is the divergence over the number of classes, and takes saying so."""
    case = CASES["t002/5x2"]
    s, t = array(case["logits_input"]), array(case["logits_target"])
    mean = kljax.forward_kl(s, t, axis=0, reduction="mean")
    np.testing.assert_allclose(mean / s.shape[0], array(case["expected"]["mean"]), **PUBLISHED)


def test_every_case_is_used():
    """The file has no case that no test computes."""
    used = ids("t000/") + ids("t001/") + ids("t002/") + ids("t003/") + ids("t004/pitfall")
    assert sorted(used) == sorted(CASES)
