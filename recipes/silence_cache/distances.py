"""How far the states of a Whisper with cached silence are from those of the padded model, by layer and place.

    python recipes/silence_cache/distances.py WHISPER --manifest a.jsonl --out results/silence_cache/distances-tiny.json

Two runs of the encoder for each utterance: the whole window, and its own length with the cache. For the input of every layer
and the output of the last, the distance of the states is given in percent of their norm: of the speech, of the real silence
behind it, and of the cached silence by its distance from the speech. Then the distributions of the next token are compared for
the text that the padded model hears; and how much of its decoder's attention goes to silence is computed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from efficient_asr.data import Row, load_row, read_manifest
from efficient_asr.evaluation.comparison import manifest_names
from efficient_asr.evaluation.result import provenance
from efficient_asr.inference.whisper import WhisperTranscriber
from efficient_asr.models.hub import model_source
from efficient_asr.models.log_mel import encoder_frames
from efficient_asr.models.whisper.own_length import POSITIONS_PER_S
from efficient_asr.settings.options import at_least
from efficient_asr.techniques.distillation.losses import kl_divergence
from efficient_asr.techniques.silence_cache.cache import SilenceCache, attention_to
from efficient_asr.utils.errors import UserError, check_writable, exit_code
from efficient_asr.utils.files import atomic_write_text

EDGES_S = (0.0, 1.0, 3.0, 10.0, 30.0)  # distances from the end of what was computed


def places_of(samples: int, own: int, window: int) -> dict[str, range]:
    """Return the positions of speech, real silence and cached silence by distance."""
    speech = int(encoder_frames(torch.tensor(samples)))
    found = {"speech": range(speech), "real silence": range(speech, own)}
    for low, high in itertools.pairwise(EDGES_S):
        first, end = (min(window, own + round(edge * POSITIONS_PER_S)) for edge in (low, high))
        found[f"cached, {low:g} to {high:g} s"] = range(first, end)
    return found


def short_rows(args: argparse.Namespace) -> list[Row]:
    """Return the first utterances of each manifest that leave room for silence in the window."""
    rows = [row for path in args.manifest for row in list(read_manifest(path))[: args.utterances]]
    rows = [row for row in rows if row["duration"] < 25]
    if not rows:
        raise UserError("--manifest: no utterance of less than 25 s")
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="WHISPER", help="Whisper directory or hub id")
    parser.add_argument("--manifest", type=Path, nargs="+", required=True, help="JSON lines: id, audio, text")
    parser.add_argument("--utterances", type=at_least(1), default=16, help="of each manifest, the first ones")
    parser.add_argument("--language", default="en", help="language of the audio")
    parser.add_argument("--encoder_padding", default="silence_cache", help="what to compare with the whole window")
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    args = parser.parse_args()
    check_writable(args.out.parent, "--out")
    return args


def main() -> None:
    """Run the command."""
    args = parse()
    rows = short_rows(args)
    transcriber = WhisperTranscriber.from_source(
        model_source(args.model), args.language, encoder_padding=args.encoder_padding
    )
    whisper = transcriber.model
    window, sums, kl, same, chosen = whisper.network.config.max_source_positions, {}, 0.0, 0, 0
    silence, sinks, tokens = 0.0, 0.0, 0  # share of the decoder's attention, over all tokens, those of the prompt too
    if not isinstance(whisper.encoder_padding, SilenceCache):
        raise UserError(
            f"--encoder_padding: {args.encoder_padding} puts nothing in the place of the silence; use silence_cache"
        )
    for row in tqdm(rows, unit="utt"):
        wavs = load_row(row)[None]
        lengths = torch.tensor([wavs.shape[1]])
        with torch.no_grad():
            with whisper.whole_window():
                plain = whisper.encode(wavs, lengths, True)
                text = transcriber.decode(plain)[0].text
            own = whisper.encode(wavs, lengths, True)
            target = torch.tensor([whisper.labels.encode_row({"text": text, "language": args.language})])[:, :-1]
            pair = [whisper.predict(encoded, target).log_softmax(-1) for encoded in (plain, own)]
        for layer, (a, b) in enumerate(zip(plain.hidden_states, own.hidden_states, strict=True)):
            for place, positions in places_of(wavs.shape[1], int(own.own), window).items():
                part = slice(positions.start, positions.stop)
                apart, norm = ((x[:, part].double() ** 2).sum().item() for x in (a - b, a))
                total = sums.setdefault((layer, place), [0.0, 0.0])
                total[0], total[1] = total[0] + apart, total[1] + norm
        weight, first = attention_to(whisper, plain, target), int(own.own)
        silence += float(weight[first:].sum()) * target.shape[1]
        sinks += float(weight[[i for i in whisper.encoder_padding.sinks if i >= first]].sum()) * target.shape[1]
        first_text = whisper.labels.prompt_length - 1  # decoding does not choose the prompt
        pair = [log_probs[:, first_text:] for log_probs in pair]
        kl += float(kl_divergence(*pair).sum())
        same += int((pair[0].argmax(-1) == pair[1].argmax(-1)).sum())
        chosen += pair[0].shape[1]
        tokens += target.shape[1]
    layers, names = sorted({layer for layer, _ in sums}), list(dict.fromkeys(place for _, place in sums))
    relative = {key: 100 * (apart / norm) ** 0.5 if norm else None for key, (apart, norm) in sums.items()}
    result = {
        "model": Path(args.model).name, "padding": whisper.encoder_padding.label,
        "audio": manifest_names(args.manifest), "utterances": len(rows),
        "layers": [
            {"layer": layer if layer < layers[-1] else "output", "relative_percent": {n: relative[layer, n] for n in names}}
            for layer in layers
        ],
        "attention_to_silence_percent": 100 * silence / tokens, "of_that_to_sinks_percent": 100 * sinks / silence,
        "kl_nats": kl / chosen, "same_token_percent": 100 * same / chosen, "provenance": provenance(None),
    }  # fmt: skip
    atomic_write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(f"result: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
