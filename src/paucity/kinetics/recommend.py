"""Which model, which attention and how many keys for a workload on a machine, with reasons.

Paper: Sadhukhan et al. 2025 (Kinetics), https://arxiv.org/abs/2506.05333: counting memory, a larger model is worth more
than more tokens of a smaller one, up to some size; sparse attention lets larger models, longer chains and more trials
into the same cost; and as the cost grows, tokens are to grow faster than the keys that each reads. The paper finds its
optimum from measured accuracies, which belong to a model and a task. Where they are given here, the most accurate plan
within the limit wins, the cheapest among equals. Where they are not, the paper's order stands in for them: the largest
model that fits the limit, and for it the most keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checks import check_int, check_range, fail
from ..measure.machine import Machine
from .predict import Seconds, eflops, predict
from .reading import Reading, reading
from .shape import Shape
from .work import Workload, generation

BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
"""Keys that are tried where none are asked for."""


@dataclass(frozen=True)
class Plan:
    """One way to do a workload.

    Attributes:
        shape: of the model.
        reading: which keys a decode step reads; None is all.
        prefill: predicted seconds of the prompts.
        decode: predicted seconds of all decode steps.
        eflops: the paper's cost of the decode steps, with the machine's operations a byte.
        accuracy: as given, None where it was not.
        cache_bytes: of the keys and values at the end.
    """

    shape: Shape
    reading: Reading | None
    prefill: Seconds
    decode: Seconds
    eflops: float
    accuracy: float | None
    cache_bytes: int

    @property
    def seconds(self) -> float:
        """Prefill and decoding."""
        return self.prefill.total + self.decode.total

    @property
    def method(self) -> str:
        """Name of the attention."""
        return "dense" if self.reading is None else self.reading.name

    @property
    def num_keys(self) -> int | None:
        """Keys read, None for all or for a share."""
        return None if self.reading is None else self.reading.num_keys

    @property
    def label(self) -> str:
        """Model, attention and keys, for sentences."""
        keys = "" if self.num_keys is None else f" with {self.num_keys} keys"
        return f"{self.shape.name}, {self.method}{keys}"


@dataclass(frozen=True)
class Recommendation:
    """The plan to take, why, and all that were weighed, in the order of `plans`."""

    plan: Plan
    reasons: tuple[str, ...]
    plans: tuple[Plan, ...]


def plans(
    shapes: Sequence[Shape],
    workload: Workload,
    machine: Machine,
    *,
    methods: Sequence[str] = ("block_topk",),
    budgets: Sequence[int] = BUDGETS,
    readings: Sequence[Reading] = (),
    accuracies: Mapping[tuple[str, str, int | None], float] | None = None,
) -> tuple[Plan, ...]:
    """Every model with dense attention and with each reading; budgets that never leave a key out are dropped.

    Args:
        shapes: of the models.
        workload: prompts and answers.
        machine: measured, in the dtypes of the shapes.
        methods: of `reading.METHODS`, each with each budget.
        budgets: keys that a step reads.
        readings: others.
        accuracies: by (name of the shape, name of the method or ``dense``, keys or None).

    Raises:
        InputError: if there is no shape, a method or a dtype is unknown, or a model's context is too short.
    """
    if not shapes:
        raise fail("plans", "shapes", "hold at least one model", "none")
    tokens = workload.prompt + workload.generate
    for budget in budgets:
        check_int("plans", "budgets", budget)
    chosen = [reading(method, budget) for method in methods for budget in sorted(set(budgets), reverse=True)]
    chosen = [option for option in [*chosen, *readings] if option.num_keys is None or option.num_keys < tokens]
    found = []
    for shape in shapes:
        if shape.context is not None and tokens > shape.context:
            raise fail("plans", "prompt and answer", f"fit the {shape.context} tokens of {shape.name}", tokens)
        for option in [None, *chosen]:
            first, steps = generation(shape, workload, reading=option)
            name = "dense" if option is None else option.name
            key = (shape.name, name, None if option is None else option.num_keys)
            found.append(
                Plan(
                    shape=shape,
                    reading=option,
                    prefill=predict(shape, first, machine),
                    decode=predict(shape, steps, machine),
                    eflops=eflops(steps, machine.intensity(shape.dtype)),
                    accuracy=None if accuracies is None else accuracies.get(key),
                    cache_bytes=_cache(shape, workload),
                )
            )
    return tuple(found)


def recommend(
    options: Sequence[Plan], *, max_seconds: float | None = None, max_eflops: float | None = None
) -> Recommendation:
    """The plan to take.

    Within the limits: the most accurate where every plan has an accuracy; otherwise the largest model, dense where that
    fits and else with the most keys. Without limits and accuracies: the largest model, with the most keys with which
    attention no longer takes most of the decoding. Where nothing fits, the fastest plan, and it is said.

    Args:
        options: of `plans`.
        max_seconds: prefill and decoding together may take.
        max_eflops: decoding may cost.

    Raises:
        InputError: if there is no plan, or a limit is not positive.
    """
    if not options:
        raise fail("recommend", "options", "hold at least one plan", "none")
    for argument, limit in (("max_seconds", max_seconds), ("max_eflops", max_eflops)):
        if limit is not None:
            check_range("recommend", argument, limit, 0, open_low=True)
    fitting = [
        plan
        for plan in options
        if (max_seconds is None or plan.seconds <= max_seconds) and (max_eflops is None or plan.eflops <= max_eflops)
    ]
    limited = max_seconds is not None or max_eflops is not None
    if not fitting:
        best = min(options, key=lambda plan: plan.seconds)
        rule = "Nothing fits the limit; this is the fastest plan."
        return Recommendation(best, (rule, *_why(best, options)), tuple(options))
    known = [plan for plan in fitting if plan.accuracy is not None]
    if len(known) == len(fitting):
        best = max(known, key=lambda plan: (plan.accuracy or 0.0, -plan.seconds))
        rule = f"It is the most accurate{' within the limit' if limited else ''} ({best.accuracy:.3g})."
        return Recommendation(best, (rule, *_why(best, options)), tuple(options))
    size = max(plan.shape.parameters for plan in fitting)
    largest = [plan for plan in fitting if plan.shape.parameters == size]
    if limited:
        best = max(largest, key=_keys)
        rule = "Without accuracies: the largest model that fits the limit, with the most keys that fit."
    else:
        calm = [plan for plan in largest if plan.decode.attention_share <= 0.5]
        best = max(calm, key=_keys) if calm else min(largest, key=lambda plan: plan.decode.total)
        rule = (
            "Without limits: the most keys with which attention does not take most of the decoding."
            if calm
            else "Attention takes most of the decoding in every plan; this is the fastest of the largest model."
        )
    return Recommendation(best, (rule, *_why(best, options)), tuple(options))


def _why(best: Plan, options: Sequence[Plan]) -> tuple[str, ...]:
    """What dense attention and the other models would take."""
    dense = next((plan for plan in options if plan.shape == best.shape and plan.reading is None), None)
    reasons = []
    if dense is not None and dense is not best:
        reasons.append(
            f"Dense, attention takes {dense.decode.attention_share:.0%} of {dense.decode.total:.4g} s of decoding; "
            f"here {best.decode.attention_share:.0%} of {best.decode.total:.4g} s: "
            f"{dense.decode.total / best.decode.total:.2f} times as fast."
        )
    elif best.reading is None:
        reasons.append(f"Attention takes {best.decode.attention_share:.0%} of the decoding, and it reads everything.")
    for plan in options:
        if plan.reading is None and plan.shape.parameters < best.shape.parameters and plan.seconds >= best.seconds:
            reasons.append(f"{plan.label}, a smaller model, takes {plan.seconds:.3g} s, no less than this.")
    return tuple(reasons)


def _keys(plan: Plan) -> tuple[float, float]:
    """Most keys first, then the faster."""
    read = plan.reading
    keys = float("inf") if read is None else read.num_keys or 1e9 * (read.density or 0)
    return float(keys), -plan.seconds


def _cache(shape: Shape, workload: Workload) -> int:
    """Keys and values held at the end; trials keep their prompt once where it is shared."""
    whole = shape.cache_bytes(workload.prompt + workload.generate)
    prompt = shape.cache_bytes(workload.prompt)
    trials = workload.trials if not workload.shared_prompt else 1
    own = whole - prompt if workload.shared_prompt else 0
    return workload.batch * (trials * whole + (workload.trials - 1) * own)
