"""The command line's options that several commands have, or that need more words than a line."""

from pathlib import Path
from typing import Annotated

import typer

from polymoe.cache_folder import VARIABLE
from polymoe.errors import PolymoeError

Specs = Annotated[
    list[str], typer.Argument(metavar="NAME=PATH…", help="a directory, or org/model[@revision] on the Hub")
]
Policy = Annotated[
    str,
    typer.Option(
        help="auto: sharing and formats chosen position by position; paper, separate, mean, regmean, delta, "
        "exact-delta, cluster: one way everywhere"
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="1.0x: expert bytes in multiples of one model's; 24GiB (or 24G): all weights on the device. K, M, G, T "
        "are powers of 1024, KB, MB, GB, TB of 1000"
    ),
]
Base = Annotated[str, typer.Option(help="format of the shared experts: stored, fp8, int8, int6, int5, int4 or int3")]
DeltaBits = Annotated[
    int | None, typer.Option(help="policy delta: bits of each variant's correction, 1 to 4; default 2")
]
Clusters = Annotated[int | None, typer.Option(help="policy cluster: groups of variants a position; default 2")]
MinTop1 = Annotated[
    float | None, typer.Option("--min-top1", help="policy auto: fewest bytes at which each variant agrees this often")
]
HostShare = Annotated[
    float | None,
    typer.Option(help="policy auto: share of what is routed that may be fetched from the host tier; default 0"),
]
Calibrate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="VARIANT=FILE",
        help="text to fit merges and formats to: plain, or .jsonl of {text} or {messages} (encoder–decoder: of {input, "
        "target}); of a large file pieces spread over it are read; may be repeated, for a variant too",
    ),
]
Distill = Annotated[
    int | None,
    typer.Option(metavar="STEPS", help="then fit delta scales, norms and routers to the originals on the text"),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        metavar="VARIANT=FILE",
        help="held-out text, as for --calibrate: measure at the end what a variant lost, and record it",
    ),
]
DType = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
SlotsOption = Annotated[
    int | None, typer.Option(help="variants whose non-experts are on the device at once; default all")
]
KVCache = Annotated[
    str, typer.Option(help="memory for keys and values, for example 4GiB; auto: what remains of a GPU, 1GiB on a CPU")
]
ExpertCache = Annotated[str, typer.Option(help="memory for absent experts that were fetched")]
MaxLen = Annotated[int | None, typer.Option(help="longest sequence in tokens; default: what the variants support")]
MaxSeqs = Annotated[int, typer.Option(help="sequences that run at once")]
MaxBatched = Annotated[int, typer.Option(help="tokens in one step")]
Weight = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=WEIGHT", help="share of a variant when all are busy; default 1 each; may be repeated"),
]
Slo = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=SECONDS", help="class of requests and its time to first token; may be repeated"),
]
AdmissionFactor = Annotated[
    float, typer.Option(help="refuse what would take this many times its SLO class; 0: refuse nothing for that")
]
TargetItl = Annotated[
    float | None, typer.Option(help="seconds: prompts are cut smaller so that no token takes longer; default no limit")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default torch's")]
Verify = Annotated[
    bool, typer.Option("--verify", help="first compare all weights with their hashes, as `polymoe verify` does")
]
Host = Annotated[str, typer.Option(help="address to listen on; another than 127.0.0.1 needs --api-key")]
Port = Annotated[int, typer.Option(min=1, max=65535)]
ApiKey = Annotated[str | None, typer.Option(envvar="POLYMOE_API_KEY", help="clients must send this key")]
AllowedOrigin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORIGIN", help="whose web pages may use the server, like http://localhost:3000; may be repeated"
    ),
]
Grace = Annotated[float, typer.Option(min=0, help="seconds to finish running requests after SIGTERM or SIGHUP")]

CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache", envvar=VARIABLE, help="where bundles planned on the fly are kept; default ~/.cache/polymoe"
    ),
]


def pairs(values: list[str], option: str) -> dict[str, Path]:
    """`VARIANT=FILE` options -> a dict, each once, each an existing path."""
    found: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise PolymoeError(f"{option} {value!r}: write VARIANT=PATH.")
        if name in found:
            raise PolymoeError(f"{option} names {name} twice.")
        if not Path(path).exists():
            raise PolymoeError(f"{option} {name}: {path} does not exist.")
        found[name] = Path(path)
    return found


def file_lists(values: list[str], option: str) -> dict[str, list[Path]]:
    """`VARIANT=FILE` options -> variant -> its files, in order; each an existing path."""
    found: dict[str, list[Path]] = {}
    for value in values:
        for name, path in pairs([value], option).items():
            found.setdefault(name, []).append(path)
    return found
