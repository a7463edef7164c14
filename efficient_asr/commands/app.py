"""A web page for models, with an endpoint for programs; or an explorer of results.

    efficient-asr app MODEL [MODEL ...]                    # microphone, upload, links; several models side by side
    efficient-asr app small=openai/whisper-small fast=output/own/model --quantise decoder-int8 --port 8080
    efficient-asr app --results results/runs               # tables and plots of results

Programs that speak OpenAI's protocol use http://127.0.0.1:7860/v1. A MODEL may have a name, NAME=MODEL. The page is bound to
loopback: to let others in, put a web server with encryption and logins in front of it, or pass --host 0.0.0.0 --allow_host NAME.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from efficient_asr import load_transcriber
from efficient_asr.reporting.explorer import explorer_html
from efficient_asr.settings.options import add_lm_options, add_whisper_options, at_least, lm_options, whisper_options
from efficient_asr.utils.devices import choose_device
from efficient_asr.utils.errors import UserError
from efficient_asr.web.limits import Limits
from efficient_asr.web.recognisers import Recogniser
from efficient_asr.web.turns import Turns


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Limits()
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="model folder, Whisper directory or hub id; NAME=MODEL"
    )
    parser.add_argument("--results", type=Path, help="folder of results to explore, instead of models")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: loopback only)")
    parser.add_argument("--port", type=at_least(0), default=7860, help="port; 0 for any that is free (default 7860)")
    parser.add_argument(
        "--allow_host", nargs="+", help="names under which the app may be reached (default: those of loopback)"
    )
    parser.add_argument(
        "--behind_proxy", action="store_true", help="a web server on this machine sets X-Forwarded-For; believe it"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: the GPU if there is one")
    limits = parser.add_argument_group("what visitors may ask for")
    limits.add_argument(
        "--longest_s", type=float, default=default.longest_s, help=f"longest recording (default {default.longest_s:g})"
    )
    limits.add_argument(
        "--largest_mb", type=float, default=default.largest_mb, help=f"largest file (default {default.largest_mb:g})"
    )
    limits.add_argument(
        "--waiting", type=at_least(1), default=default.waiting, help=f"requests of all (default {default.waiting})"
    )
    limits.add_argument(
        "--per_address", type=at_least(1), default=default.per_address,
        help=f"requests of one network address (default {default.per_address})",
    )  # fmt: skip
    limits.add_argument(
        "--link_hosts",
        nargs="*",
        default=default.link_hosts,
        help=f"hosts of links (default {' '.join(default.link_hosts)})",
    )
    add_lm_options(parser)
    add_whisper_options(parser)
    args = parser.parse_args(argv)
    if bool(args.models) == bool(args.results):
        raise UserError("give one or more models, or a folder with --results")
    if args.language == "manifest":
        raise UserError("--language manifest: recordings have no manifest; choose the language on the page")
    if args.port > 65535:
        raise UserError(f"--port: {args.port} is not a port; give a number up to 65535")
    if not (0 < args.longest_s < math.inf and 0 < args.largest_mb < math.inf):
        raise UserError("--longest_s and --largest_mb must be numbers above 0")
    args.device = choose_device(args.device)
    return args


def named(models: list[str]) -> dict[str, str]:
    """Return models by name: the name that was given, or the last parts of the path.

    Raises
    ------
    UserError
        If two models have the same name.
    """
    found: dict[str, str] = {}
    for model in models:
        name, equals, source = model.partition("=")
        if not equals:
            name, source = Path(model).name, model
            if name in ("model", "student"):  # what recipes call their folders
                name = "/".join(Path(model).parts[-3:])
        if not name or not source or name in found:
            raise UserError(f"'{model}': give every model a name of its own, NAME=MODEL")
        found[name] = source
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    sources, page = named(args.models), explorer_html(args.results) if args.results else ""
    try:
        from efficient_asr.web import server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'efficient_asr[app]'") from None
    server.interrupt_on_sigterm()
    if args.results:
        server.serve(server.make_explorer(page, args.allow_host), args.host, args.port)
        return
    limits = Limits(
        longest_s=args.longest_s, largest_mb=args.largest_mb, waiting=args.waiting, per_address=args.per_address,
        link_hosts=tuple(args.link_hosts),
    )  # fmt: skip
    turns, options = Turns(), whisper_options(args) | lm_options(args)
    recognisers = []
    for name, source in sources.items():
        print(f"loading {name}", flush=True)
        recognisers.append(Recogniser(name, load_transcriber(source, **options).to(args.device), turns))
    with server.own_folder():
        app = server.make_app(recognisers, limits, args.allow_host)
        server.serve(app, args.host, args.port, args.behind_proxy)
