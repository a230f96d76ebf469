"""A survey on the terminal: tables, a histogram, what would be rejected."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.config import DataConfig
from data.dataset import InstructionDataset
from data.inspect.samples import show_whitespace
from data.inspect.survey import Survey, quantiles
from data.rejects import SOONEST, count_allowed
from data.stream import StreamedDataset

BAR = 60
BINS = 16
LABELS = {
    "total": "tokens",
    "text": "  of text",
    "image": "  of images",
    "supervised": "  supervised",
    "images": "images",
    "rounds": "rounds",
}


def print_report(
    console: Console, config: DataConfig, data: InstructionDataset | StreamedDataset, result: Survey
) -> bool:
    """Print everything but samples; True where a run would stop because too much is bad."""
    console.print(build_sources_table(data, result))
    part = "" if result.share is None else f", {result.share:.1%} of an epoch"
    console.print(
        f"\n[bold]{result.read:,}[/bold] read{part}: [bold]{len(result.facts):,}[/bold] used, "
        f"[bold]{len(result.rejections):,}[/bold] rejected"
    )
    if result.facts:
        console.print(per_sample(result))
        console.print(
            f"{result.supervised_share():.1%} of all tokens are supervised; "
            f"{len(result.cut):,} samples are truncated to {config.max_length:,} tokens; "
            f"{result.duplicates():,} share their id with another"
        )
        console.print(Text("\ntokens per sample", style="bold"))
        console.print(render_histogram(result))
    total = SOONEST if isinstance(data, StreamedDataset) else min(SOONEST, len(data))
    return print_rejected(console, config, result, max(result.read, total))


def build_sources_table(data: InstructionDataset | StreamedDataset, result: Survey) -> Table:
    table = Table(title="sources", title_justify="left", title_style="bold")
    for name in ("source", "records", "used of them", "weight", "looked at", "rejected"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for source in data.sources:
        looked = sum(facts.source == source.label for facts in result.facts)
        bad = sum(rejection.source == source.label for rejection in result.rejections)
        stored = "stream" if isinstance(data, StreamedDataset) else f"{len(source.records):,}"  # type: ignore[arg-type]
        used = "" if isinstance(data, StreamedDataset) else f"{len(source):,}"  # type: ignore[arg-type]
        table.add_row(Text(source.label), stored, used, f"{source.weight:g}", f"{looked + bad:,}", f"{bad:,}")
    return table


def per_sample(result: Survey) -> Table:
    table = Table()
    table.add_column("a sample has")
    for name in ("mean", "median", "95 %", "most", "all together"):
        table.add_column(name, justify="right")
    for name, label in LABELS.items():
        found = quantiles(result.column(name))
        table.add_row(
            label,
            f"{found['mean']:,.1f}",
            f"{found['median']:,.0f}",
            f"{found['p95']:,.0f}",
            f"{found['max']:,.0f}",
            f"{found['sum']:,.0f}",
        )
    return table


def render_histogram(result: Survey) -> Text:
    """Samples by length; each bar in the proportion of image and text tokens of its samples."""
    total, image = result.column("total"), result.column("image")
    edges = np.histogram_bin_edges(total, BINS, (total.min(), total.max() + 1))
    edges = np.unique(edges.round())
    places = np.clip(np.searchsorted(edges, total, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(places, minlength=len(edges) - 1)
    width = len(f"{int(edges[-1]):,}")
    text = Text()
    for number, count in enumerate(counts):
        share = image[places == number].sum() / max(total[places == number].sum(), 1)
        length = 0 if count == 0 else max(1, round(count / counts.max() * BAR))
        of_images = round(length * share)
        text.append(f"{int(edges[number]):>{width},} – {int(edges[number + 1]):>{width},} ", style="dim")
        text.append("█" * of_images, style="cyan").append("▒" * (length - of_images), style="yellow")
        text.append(f" {count:,}\n")
    return (
        text.append("█ images ", style="cyan")
        .append("▒ text", style="yellow")
        .append(", each bar in their proportion", style="dim")
    )


def print_rejected(console: Console, config: DataConfig, result: Survey, of: int) -> bool:
    """Print what is rejected; True where that is more than a run allows of so many records."""
    if not result.rejections:
        console.print("\n[green]nothing would be rejected[/green]")
        return False
    table = Table(title="\nwould be rejected", title_justify="left", title_style="bold")
    table.add_column("reason")
    table.add_column("records", justify="right")
    table.add_column("share", justify="right")
    table.add_column("for example", max_width=72)
    for reason, count in result.reasons.most_common():
        example = next(rejection for rejection in result.rejections if rejection.reason == reason)
        where = f"{example.source} #{example.index} ({example.id}) {example.detail}"
        table.add_row(reason, f"{count:,}", f"{count / result.read:.2%}", Text(show_whitespace(where[:200])))
    console.print(table)
    limit = count_allowed(config.max_rejected, of)
    too_many = len(result.rejections) > limit
    verdict = "[bold red]a run would stop[/bold red]" if too_many else "[green]a run would go on[/green]"
    console.print(
        f"{result.rejected:.2%} rejected; data.max_rejected is {config.max_rejected:.2%} and allows {limit:,} of {of:,}: {verdict}"
    )
    return too_many
