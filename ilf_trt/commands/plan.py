"""The command `plan`: print a step plan and its cost."""

import json
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ilf_trt.contract.plan import (
    DEFAULT_FEEDBACK,
    Ratio,
    Rule,
    StepPlan,
    cached_block_forwards,
    make_plan,
    read_scheduler,
)
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import InvalidRequest

from .flags import RatioName
from .numbers import OptionalWhole, Whole


def plan(
    *,
    blocks: Whole,
    steps: Whole,
    loop: str | None = None,
    feedback: str = DEFAULT_FEEDBACK,
    rule: Rule = Rule.ANNEAL,
    ratio: RatioName = "m/n",
    scheduler: str = "dpmsolver++",
    cache_blocks: OptionalWhole = None,
    cache_every: Whole = 2,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Print a step plan: times, which steps get feedback, and the cost in block forwards.

    Example: `ilf-trt plan --blocks 28 --loop 8:19 --steps 10 --feedback outer:2`

    Parameters
    ----------
    blocks
        Blocks of the backbone.
    steps
        Solver steps.
    loop
        First and last block of the inner loop, BEGIN:END; not needed with `--feedback none` or a cache.
    feedback
        Steps that get feedback: all, none, alternate, first:K, last:K, outer:K, inner:K or numbers 0,1,8,9.
    rule
        Where the network is conditioned after feedback.
    ratio
        Weight of the loop's size in the rule.
    scheduler
        dpmsolver++, ddim, euler, or a diffusers scheduler_config.json.
    cache_blocks
        Print the caching baseline instead: the middle blocks whose results are kept between steps.
    cache_every
        Run the cached blocks again on every N-th step.
    json_
        Print JSON.
    """
    caching = cache_blocks is not None
    if loop is None and not caching and feedback != "none":
        raise InvalidRequest("a plan with feedback needs --loop BEGIN:END, such as --loop 8:19; or --feedback none")
    made = make_plan(
        read_scheduler(scheduler),
        steps,
        blocks=blocks,
        loop=Loop.parse(loop) if loop else Loop(0, blocks - 1),
        feedback="none" if caching else feedback,
        rule=rule,
        ratio=Ratio(ratio),
    )
    costs = tuple(step.block_forwards for step in made.steps)
    if cache_blocks is not None:
        costs = cached_block_forwards(blocks, steps, cached=cache_blocks, every=cache_every)
    if json_:
        data = made.as_json() | {"block_forwards": sum(costs)}
        for step, cost in zip(data["steps"], costs, strict=True):
            step["block_forwards"] = cost
        print(json.dumps(data, indent=2))  # noqa: T201
    else:
        print_plan(made, costs, Console())


def print_plan(made: StepPlan, costs: tuple[int, ...], console: Console) -> None:
    table = Table("step", "t", "t_post", "feedback", "block forwards")
    for index, (step, cost) in enumerate(zip(made.steps, costs, strict=True)):
        table.add_row(str(index), f"{step.t:g}", f"{step.t_post:.1f}", "yes" if step.feedback else "", str(cost))
    console.print(table)
    console.print(f"block forwards: {sum(costs)}", highlight=False)
