"""The view of `inspect --engines`: prints the reports of a bundle's engines."""

import json

from rich.console import Console

from ilf_trt.contract.bundle import Bundle
from ilf_trt.errors import InvalidRequest, shown

from .compiler import read_report
from .report import layer_table, report_table


def show_engines(bundle: Bundle, *, as_json: bool) -> None:
    """Print the report of every engine, as tables or as JSON; raises InvalidRequest if the bundle has no engines."""
    engines = bundle.manifest.engines
    if not engines:
        raise InvalidRequest(f"{bundle.path} has no engines; add them with ilf-trt compile {bundle.path} --target …")
    reports = [(facts, read_report(bundle.path / facts.report)) for facts in engines]
    if as_json:
        print(json.dumps([{"target": facts.target, **report.as_json()} for facts, report in reports], indent=2))  # noqa: T201
        return
    console = Console()
    for target in dict.fromkeys(facts.target for facts in engines):
        first = next(facts for facts in engines if facts.target == target)
        title = shown(f"{target} {first.library_version} for {', '.join(first.gpus)}")
        console.print(title, highlight=False, markup=False)
        of_target = tuple(report for facts, report in reports if facts.target == target)
        for report in of_target:
            console.print(layer_table(report))
        console.print(report_table(of_target))
