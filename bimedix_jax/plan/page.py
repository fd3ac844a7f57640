"""The estimate of `bimedix plan` as tables for a terminal."""

from typing import Any

from rich import box
from rich.console import Console

from bimedix_jax.process.terminal import FittedTable

GIB, TERA, GIGA = 2**30, 1e12, 1e9
LABELS = {
    "base": "base weights",
    "adapters": "trained parameters",
    "optimiser": "optimiser",
    "batch": "batch",
    "activations": "kept for the backward pass",
    "temporaries": "gradients, gathered weights, working space",
    "cache": "keys and values",
}


def show(document: dict[str, Any], console: Console) -> None:
    """Prints the document of `bimedix plan` as tables."""
    verdict = "fits" if document["fits"] else "does NOT fit"
    limit = document["memory_bytes_per_device"] / GIB
    peak = document["peak_bytes_per_device"]
    needs = f"{peak / GIB:.1f} GiB a device" if peak is not None else "more than a device has"
    console.print(f"[bold]{document['target']}[/bold]: {verdict}; needs {needs}, of {limit:.1f} GiB", highlight=False)
    for line in document["changed"]:
        console.print(f"  changed {line}", highlight=False)
    console.print(memory_table(document))
    if "flops" in document:
        console.print(work_table(document))
        console.print(time_table(document))
    for name in ("prefill", "decode"):
        if "step_seconds" in document.get(name, {}):
            console.print(inference_line(name, document[name]), highlight=False)
        elif name in document:
            console.print(f"{name}: does NOT fit on {document[name]['devices']} device(s)", highlight=False)
    console.print("Assumed: " + "; ".join(f"{name}: {value}" for name, value in document["assumptions"].items()),
                  style="dim", highlight=False)  # fmt: skip


def plain_table(title: str, *columns: str) -> FittedTable:
    table = FittedTable(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def memory_table(document: dict[str, Any]) -> FittedTable:
    table = plain_table("Memory of each device", "part", "GiB")
    for name, size in document["parts"].items():
        table.add_row(LABELS.get(name, name), f"{size / GIB:.2f}")
    return table


def work_table(document: dict[str, Any]) -> FittedTable:
    table = plain_table("FLOPs of an optimiser step, all devices", "what", "TFLOP", "of useful")
    useful = document["useful_flops"]
    table.add_row(
        "counted in the compiled program", f"{document['flops'] / TERA:,.0f}", f"{document['flops'] / useful:.3f}"
    )
    for name, flops in document["useful_parts"].items():
        table.add_row(f"useful: {name}", f"{flops / TERA:,.0f}", f"{flops / useful:.3f}")
    for name, flops in document["excess_flops"].items():
        table.add_row(f"excess: {name}", f"{flops / TERA:,.0f}", f"{flops / useful:.3f}")
    for kind, size in document["collective_bytes"].items():
        table.add_row(
            f"sent by each device in {document['collectives'][kind]:,.0f} {kind}", f"{size / GIGA:,.2f} GB", ""
        )
    return table


def time_table(document: dict[str, Any]) -> FittedTable:
    table = plain_table("Predicted time of a step", "what", "seconds")
    for name, seconds in document["roofline"].items():
        table.add_row(f"{name.removesuffix('_seconds')} alone", f"{seconds:.3f}")
    for name, seconds in document["device_seconds_by_part"].items():
        table.add_row(f"  kernels: {name}", f"{seconds:.3f}")
    table.add_row("kernels one after another", f"{document['device_seconds']:.3f}")
    table.add_row("network, not overlapped", f"{document['exposed_network_seconds']:.3f}")
    table.add_row("step", f"{document['step_seconds']:.3f}")
    paper = document["paper"]
    table.caption = (
        f"{document['tokens_per_s']:,.0f} tokens/s; BiMed1.3M twice: {document['hours']:.1f} h, "
        f"{document['device_hours']:.0f} device-hours (paper: {paper['hours']:.0f} h on {paper['devices']})"
    )
    return table


def inference_line(name: str, row: dict[str, Any]) -> str:
    what = "prefill of" if name == "prefill" else "decoding behind"
    verdict = "fits" if row["fits"] else "does NOT fit"
    return (
        f"{what} {row['rows']} x {row['prompt_tokens']} tokens on {row['devices']} device(s): {verdict} "
        f"({row['peak_bytes_per_device'] / GIB:.1f} GiB each), {1e3 * row['step_seconds']:.1f} ms, "
        f"{row['tokens_per_s']:,.0f} tokens/s"
    )
