r"""Transformers' Whisper with language experts, and the files of the experts.

The blocks, the gates and the equation :math:`h = g \, \mathrm{FFN}_l(x) + (1 - g) \, \mathrm{FFN}_{shared}(x)` of
"Multilingual DistilWhisper" (arXiv 2311.01070) are in `experts.py`. This module inserts them into transformers' Whisper, and
loads, saves and switches them. The interactive example of the published README works with `from
efficient_asr.techniques.clsr.network import DistilWhisperForConditionalGeneration`.

Deviations from the published class of the same name: weights are stored as safetensors (files in the published layout can be
read, tensors only); experts can be removed; several experts can be loaded at once; `routing` sets the languages of a batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from transformers.utils.hub import cached_file

from efficient_asr.techniques.clsr.experts import SIDES, Expert, ExpertBlock, ExpertSettings, Routing, language_code
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write
from efficient_asr.utils.safe_load import load_state

FORMAT = "efficient_asr expert 1"
_PUBLISHED = re.compile(
    r"model\.(encoder|decoder)\.layers\.(\d+)\.ffn_clsr\.(?:proj|(gate_in|gate_out))\.([^.]+)\.(.+)"
)


class DistilWhisperForConditionalGeneration(WhisperForConditionalGeneration):
    """Transformers' Whisper with experts, and the methods of the published class of the same name.

    On disk it is a plain Whisper directory that any program can use, plus one `expert.<language>.safetensors` file per
    expert.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.routing, self.settings = Routing(), ExpertSettings()
        self.blocks: dict[tuple[str, int], ExpertBlock] = {}
        self.languages: list[str] = []  # codes
        self.chosen: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, source: str, *args: Any, experts: list[str] | None = None, **kwargs: Any) -> Any:
        """Load a directory or hub id: a plain Whisper, a directory written by `save_pretrained`, or the published model.

        Arguments
        ---------
        source : str
            Directory or hub id.
        experts : list of str, optional
            Languages to load; None for all experts written by `save_pretrained`.
        **kwargs
            Arguments of transformers' `from_pretrained`.

        Raises
        ------
        UserError
            If an expert file is missing or damaged.
        """
        # the published model stores its original blocks under other names
        kwargs.setdefault("key_mapping", {r"\.ffn_clsr\.proj\.shared\.": "."})
        found = super().from_pretrained(source, *args, **kwargs)
        network = found[0] if isinstance(found, tuple) else found
        network._wrap()
        network.config._name_or_path = str(source)
        stored = getattr(network.config, "experts", None) or []
        for language in stored if experts is None else experts:
            network.load_experts(language)
        network.set_language_task(None)
        return found

    def _wrap(self) -> None:
        """Prepare every layer for experts; the output is unchanged as long as there are none."""
        for side in SIDES:
            for i, layer in enumerate(getattr(self.model, side).layers):
                if not isinstance(layer.fc2, ExpertBlock):
                    ExpertBlock(layer, (side, i), self.routing).install(layer)
                self.blocks[side, i] = layer.fc2

    def unwrap(self) -> None:
        """Restore the original layers and discard all experts."""
        for (side, i), block in self.blocks.items():
            block.restore(getattr(self.model, side).layers[i])
        self.blocks, self.languages, self.chosen = {}, [], {}

    def _apply_to_plain(self, work: Callable[[], Any]) -> Any:
        """Call `work` with the original layers temporarily restored."""
        blocks = [(getattr(self.model, side).layers[i], block) for (side, i), block in self.blocks.items()]
        for layer, block in blocks:
            block.restore(layer)
        try:
            return work()
        finally:
            for layer, block in blocks:
                block.install(layer)

    # ------------------------------------------------------------ experts

    def add_language(self, language: str, settings: ExpertSettings | None = None) -> str:
        """Add an expert with the outputs of the shared blocks and open gates, replacing an existing one of this language.

        Arguments
        ---------
        language : str
            Code or English name.
        settings : ExpertSettings, optional
            Shape and placement of the expert; the network's `settings` by default.

        Returns
        -------
        str
            The language code.

        Raises
        ------
        UserError
            If Whisper does not support the language, or the network does not have one of the layers.
        """
        code, settings = language_code(language), settings or self.settings
        places = settings.places(self.config)
        for place, block in self.blocks.items():
            if code in block.experts:
                del block.experts[code]
            if place in places:
                block.experts[code] = Expert(block.fc1, block.fc2, settings).train(self.training)
        self.languages = [*(other for other in self.languages if other != code), code]
        self.routing.forget()
        return code

    def remove_experts(self, language: str) -> None:
        """Remove an expert; its language uses the shared blocks from then on.

        Raises
        ------
        UserError
            If no expert of this language is loaded.
        """
        code = self._loaded(language)
        for block in self.blocks.values():
            if code in block.experts:
                del block.experts[code]
        self.languages.remove(code)
        if self.chosen.get("language") == code:
            self.set_language_task(None)
        self.routing.forget()

    def expert(self, language: str) -> dict[tuple[str, int], Expert]:
        """Return the modules of an expert by side and layer.

        Raises
        ------
        UserError
            If no expert of this language is loaded.
        """
        code = self._loaded(language)
        return {place: block.experts[code] for place, block in self.blocks.items() if code in block.experts}

    def _loaded(self, language: str) -> str:
        code = language_code(language)
        if code not in self.languages:
            there = ", ".join(self.languages) or "none"
            raise UserError(
                f"no expert for '{language}' is loaded (loaded: {there}); call load_experts('{language}') first"
            )
        return code

    def set_language_task(
        self, language: str | None = None, step_proportion: float | None = None, task: str | None = None
    ) -> None:
        """Select the expert for all following utterances, and the default language and task of `generate`.

        Arguments
        ---------
        language : str or None
            Code or English name; None for the shared blocks.
        step_proportion : float, optional
            Completed share of the training; scales the noise of the gates.
        task : str, optional
            `transcribe`, or `translate`, for which the decoder uses the shared blocks, as in the paper.

        Raises
        ------
        UserError
            If no expert of this language is loaded.
        """
        code = None if language is None else self._loaded(language)
        self.routing.set("encoder", code)
        self.routing.set("decoder", None if task == "translate" else code)
        if step_proportion is not None:
            self.routing.progress = step_proportion
        self.chosen = {"language": code, "task": task or "transcribe"} if code else {}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; language and task default to those of `set_language_task`.

        If a given `language` (or one per utterance) has an expert, this call uses that expert. The redundant
        `config.forced_decoder_ids`, which transformers has deprecated and rejects, is removed.
        """
        self.config.__dict__.pop("forced_decoder_ids", None)
        language = kwargs.get("language") or self.chosen.get("language")
        if getattr(self.generation_config, "is_multilingual", False):
            kwargs |= {key: value for key, value in self.chosen.items() if kwargs.get(key) is None}
        else:
            language = "en"
        codes = [language_code(a) for a in language] if isinstance(language, (list, tuple)) else language
        codes = codes[0] if isinstance(codes, list) and len({*codes}) == 1 else codes
        codes = language_code(codes) if isinstance(codes, str) else codes
        translated = kwargs.get("task") == "translate"
        with self.routing.using("encoder", codes), self.routing.using("decoder", None if translated else codes):
            return super().generate(*args, **kwargs)

    # ------------------------------------------------------------ files

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a plain Whisper directory, and one file per expert."""
        self.config.experts = list(self.languages)
        # other programs load the directory as a plain Whisper, without the experts
        self._apply_to_plain(
            lambda: super(DistilWhisperForConditionalGeneration, self).save_pretrained(folder, *args, **kwargs)
        )
        config_path = Path(folder) / "config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["architectures"] = ["WhisperForConditionalGeneration"]
        config_path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for language in self.languages:
            self.save_expert(language, Path(folder))

    def save_expert(self, language: str, folder: str | Path) -> Path:
        """Write `expert.<language>.safetensors` with only the experts and gates of this language.

        Raises
        ------
        UserError
            If no expert of this language is loaded.
        """
        tensors, ranks, width = {}, set(), 0
        for (side, i), part in self.expert(language).items():
            tensors |= {
                f"{side}.layers.{i}.{k}": v.detach().cpu().contiguous().clone() for k, v in part.state_dict().items()
            }
            ranks.add(part.fc1[0].out_features if part.low_rank else None)
            width = part.gate_in.out_features
        code = language_code(language)
        layers = [f"{side}.{i + 1}" for side, i in self.expert(language)]
        settings = asdict(ExpertSettings(layers, ranks.pop(), width))
        path = Path(folder) / f"expert.{LANGUAGES[code]}.safetensors"
        with atomic_write(path) as partial:
            save_file(tensors, partial, {"format": FORMAT, "language": code, "settings": json.dumps(settings)})
        return path

    def load_experts(self, target_lang: str | list[str], expert_local_dir: str | Path | None = None) -> None:
        """Load one or several experts, replacing loaded experts of the same languages, and select the last one.

        Arguments
        ---------
        target_lang : str or list of str
            Codes or English names.
        expert_local_dir : str or Path, optional
            Location of `expert.<language>.safetensors` or `.bin`; by default the directory or hub id of the network.

        Raises
        ------
        UserError
            If a file is missing, damaged, or belongs to another Whisper.
        """
        for language in [target_lang] if isinstance(target_lang, str) else target_lang:
            code = language_code(language)
            path = self._find_expert(code, str(expert_local_dir or self.config._name_or_path))
            tensors, settings = read_expert(path, code)
            before = self.expert(code) if code in self.languages else None
            try:
                self.add_language(code, settings)
                for (side, i), part in self.expert(code).items():
                    start = f"{side}.layers.{i}."
                    part.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
            except (RuntimeError, UserError) as error:
                if code in self.languages:
                    self.remove_experts(code)
                for place, part in (before or {}).items():
                    self.blocks[place].experts[code] = part
                self.languages += [code] if before else []
                reason = str(error).splitlines()[-1].strip()
                raise UserError(f"{path} is not an expert for this Whisper ({reason})") from None
            self.set_language_task(code)

    @staticmethod
    def _find_expert(code: str, source: str) -> Path:
        names = [f"expert.{name}.{kind}" for kind in ("safetensors", "bin") for name in (LANGUAGES[code], code)]
        for name in names:
            try:
                found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"'{source}' is not a directory or a reachable hub id ({str(error).splitlines()[0]})"
                ) from None
            if found is not None:
                return Path(found)
        raise UserError(f"{source} contains no expert for {LANGUAGES[code]} (expected {names[0]} or {names[2]})")


def read_expert(path: Path, code: str) -> tuple[dict[str, torch.Tensor], ExpertSettings]:
    """Read an expert file, also in the published layout: the tensors by `<side>.layers.<i>.<name>`, and the settings.

    Raises
    ------
    UserError
        If the file is damaged, contains anything but tensors, or belongs to another language.
    """
    if path.suffix == ".bin":
        tensors, known = {}, (code, LANGUAGES[code])
        for key, value in load_state(path).items():
            match = _PUBLISHED.fullmatch(key)
            if match and match[4] in known:
                tensors[f"{match[1]}.layers.{match[2]}.{match[3] + '.' if match[3] else ''}{match[5]}"] = value
        if not tensors:
            raise UserError(f"{path} contains no expert for {LANGUAGES[code]} in the published layout")
        places = sorted({tuple(key.split(".")[:3:2]) for key in tensors}, key=lambda p: (SIDES.index(p[0]), int(p[1])))
        width = next((value.shape[0] for key, value in tensors.items() if key.endswith("gate_in.weight")), None)
        if width is None:
            raise UserError(f"{path} contains no gates for {LANGUAGES[code]}; the file is incomplete")
        return tensors, ExpertSettings([f"{side}.{int(i) + 1}" for side, i in places], None, width)
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or about.get("language") != code:
                raise UserError(
                    f"{path} is not an expert for {LANGUAGES[code]} "
                    f"(language: {about.get('language')}, format: {about.get('format')})"
                )
            return {key: file.get_tensor(key) for key in file.keys()}, ExpertSettings(**json.loads(about["settings"]))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from None
