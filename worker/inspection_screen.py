"""A model's report for a person."""

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from engine.footprint.report import Identity, ModelReport, Serving, Source, Verdict
from pdmesh.cli.json_output import to_json
from pdmesh.cli.terminal import make_console, plain_table
from pdmesh.cli.words import size


def print_report(report: ModelReport, *, json: bool) -> None:
    if json:
        print(to_json(report), flush=True)
    else:
        make_console().print(_screen(report))


def _screen(report: ModelReport) -> Group:
    sections: list[tuple[str, RenderableType]] = [
        ("model", _model(report.model)),
        ("files", _files(report.source)),
        ("memory", _memory(report.serving)),
        ("KV cache", _kv(report)),
        ("verdict", _verdict(report.verdict)),
    ]
    lines: list[RenderableType] = []
    for title, content in sections:
        lines += [Text(title, "bold"), Padding(content, (0, 0, 1, 2), expand=False)]
    return Group(*lines)


def _model(model: Identity) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True)
    tied = ", the output matrix is the embedding" if model.tied_output else ""
    grid.add_row("name", f"{model.name}, a {model.architecture}")
    grid.add_row("parameters", f"{model.num_parameters:,}{tied}")
    grid.add_row(
        "layers",
        f"{model.num_layers} of width {model.hidden_size:,}, MLP {model.intermediate_size:,}, {model.num_heads} heads "
        f"over {model.num_kv_heads} KV heads of {model.head_dim}",
    )
    for window in model.windows:
        grid.add_row("", f"{window.num_layers} of them see the last {window.num_tokens:,} tokens")
    grid.add_row("vocabulary", f"{model.vocab_size:,}")
    grid.add_row("context", f"{model.max_position:,} tokens")
    return grid


def _files(source: Source) -> RenderableType:
    table = plain_table("encoding", "tensors", "size")
    for encoded in source.encodings:
        table.add_row(encoded.encoding, str(encoded.num_tensors), size(encoded.num_bytes))
    first, *others = source.files
    more = f" and {len(others)} more" if others else ""
    return Group(Text(f"{first}{more}: {source.format}, {size(source.num_bytes)}"), table)


def _memory(serving: Serving) -> RenderableType:
    slower = f"; not by our kernels: {serving.not_faster_because}" if serving.not_faster_because else ""
    bits = f", weights in {serving.quantization}" if serving.quantization != "none" else ""
    head = Text(f"on {serving.device} in {serving.dtype}{bits}, by {serving.computed_by}{slower}")
    ranks = plain_table(
        "rank", "in", "layers", "heads", "KV heads", "embedding", "layers", "output", "buffers", "KV cache"
    )
    for rank in serving.ranks:
        weights = rank.weights
        ranks.add_row(
            str(rank.rank), rank.room, f"{rank.layers[0]} to {rank.layers[1]}", str(rank.num_heads),
            str(rank.num_kv_heads), _or_none(weights.embedding), size(weights.layers), _or_none(weights.output),
            size(rank.buffers), _or_none(rank.kv_cache),
        )  # fmt: skip
    rooms = plain_table("in", "processes", "weights", "buffers", "KV cache", "in all", "free")
    for room in serving.rooms:
        there = [rank for rank in serving.ranks if rank.room == room.name]
        rooms.add_row(
            room.name, _or_none(room.processes), size(sum(rank.resident_weights for rank in there)),
            size(sum(rank.buffers for rank in there)), _or_none(sum(rank.kv_cache for rank in there)),
            size(room.needed), size(room.free),
        )  # fmt: skip
    waiting = [
        Text(f"rank {rank.rank}: weights of {size(num_bytes)} wait on {place}, and come in ahead of need")
        for rank in serving.ranks
        for place, num_bytes in rank.waiting.items()
    ]
    return Group(head, ranks, *waiting, Text(), rooms)


def _kv(report: ModelReport) -> RenderableType:
    serving, verdict = report.serving, report.verdict
    lines = [
        Text(
            f"{serving.token_bytes:,} bytes a token in {serving.kv_dtype}, {size(serving.block_bytes)} a block of "
            f"{serving.block_size} tokens; {size(verdict.full_context_kv_bytes)} for one request of "
            f"{report.model.max_position:,} tokens"
        )
    ]
    if not verdict.fits:
        return Group(*lines)
    lines.append(Text(f"{verdict.num_blocks:,} blocks, {size(verdict.kv_cache_bytes)}"))
    contexts = plain_table("request of", "takes", "at once")
    for context in verdict.contexts:
        contexts.add_row(f"{context.num_tokens:,} tokens", size(context.kv_bytes), f"{context.num_requests:,}")
    return Group(*lines, contexts)


def _verdict(verdict: Verdict) -> RenderableType:
    degrees = ", ".join(map(str, verdict.possible_tp))
    split = Text(f"can be split by --tp {degrees}", "dim")
    if verdict.fits:
        return Group(Text(f"fits, for requests of up to {verdict.max_model_len:,} tokens", "green"), split)
    lines = [Text(f"does not fit: {verdict.problem}", "red")]
    lines += [Text(f"{'try' if index == 0 else ' or'} {remedy}") for index, remedy in enumerate(verdict.remedies)]
    if not verdict.remedies:
        lines.append(Text("nothing here makes it fit: take a smaller model, or a machine with more memory"))
    return Group(*lines, split)


def _or_none(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes else "none"
