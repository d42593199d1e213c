"""What `inspect --engines` shows of a bundle's engines, from the reports that were written when they were built."""

import json

from rich.console import Console

from ilf_trt.contract.bundle import Bundle
from ilf_trt.engines.compiler import read_report
from ilf_trt.engines.report import layer_table, report_table
from ilf_trt.errors import InvalidRequest


def show_engines(bundle: Bundle, *, as_json: bool) -> None:
    """Print every engine's report; raises InvalidRequest when the bundle has no engines."""
    engines = bundle.manifest.engines
    if not engines:
        raise InvalidRequest(f"{bundle.path} holds no engines; add them with ilf-trt compile {bundle.path} --target …")
    reports = [(facts, read_report(bundle.path / facts.report)) for facts in engines]
    if as_json:
        print(json.dumps([{"target": facts.target, **report.as_json()} for facts, report in reports], indent=2))  # noqa: T201
        return
    console = Console()
    for target in dict.fromkeys(facts.target for facts in engines):
        few = [(facts, report) for facts, report in reports if facts.target == target]
        heading = f"{target} {few[0][0].library_version} for {', '.join(few[0][0].gpus)}"
        console.print(heading, highlight=False, markup=False)
        for _, report in few:
            console.print(layer_table(report))
        console.print(report_table(tuple(report for _, report in few)))
