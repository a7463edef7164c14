r"""Transformers' Whisper with language experts, and their files.

Blocks, gates and the equation :math:`h = g \, \mathrm{FFN}_l(x) + (1 - g) \, \mathrm{FFN}_{shared}(x)` of "Multilingual
DistilWhisper" (arXiv 2311.01070) are in `clsr.py`; here they are put into transformers' Whisper, loaded, saved and switched.
The interactive example of the published README works with `from efficient_asr.techniques.clsr.network import
DistilWhisperForConditionalGeneration`.

Deviations from the published class of this name: weights are safetensors (files of the published layout are read, as tensors
only); experts can be removed, and several be there at once; the mix of languages in a batch is `routing`'s to say.
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
    """Transformers' Whisper with experts, and the methods of the published class of this name.

    On the disk it is a plain Whisper directory, which any program can use, with `expert.<language>.safetensors` files beside
    it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.routing, self.settings = Routing(), ExpertSettings()
        self.blocks: dict[tuple[str, int], ExpertBlock] = {}
        self.languages: list[str] = []  # codes
        self.chosen: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, source: str, *args: Any, experts: list[str] | None = None, **kwargs: Any) -> Any:
        """Load a directory or hub id: a plain Whisper, one that `save_pretrained` wrote, or the published model.

        Arguments
        ---------
        source : str
            Directory or hub id.
        experts : list of str, optional
            Languages to load; None for all that `save_pretrained` wrote.
        **kwargs
            Of transformers' `from_pretrained`.

        Raises
        ------
        UserError
            Where an expert's file is missing or damaged.
        """
        # the published model keeps its original blocks elsewhere
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
        """Make room for experts in every layer; without any nothing changes."""
        for side in SIDES:
            for i, layer in enumerate(getattr(self.model, side).layers):
                if not isinstance(layer.fc2, ExpertBlock):
                    ExpertBlock(layer, (side, i), self.routing).install(layer)
                self.blocks[side, i] = layer.fc2

    def unwrap(self) -> None:
        """Give every layer back what it had; experts are forgotten."""
        for (side, i), block in self.blocks.items():
            block.restore(getattr(self.model, side).layers[i])
        self.blocks, self.languages, self.chosen = {}, [], {}

    def _apply_to_plain(self, work: Callable[[], Any]) -> Any:
        """Do something while every layer is as it was."""
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
        """Add an expert that computes what the shared blocks do, with open gates; one that is there already is replaced.

        Arguments
        ---------
        language : str
            Code or English name.
        settings : ExpertSettings, optional
            What it looks like; the network's `settings` by default.

        Returns
        -------
        str
            The code.

        Raises
        ------
        UserError
            Where Whisper has no such language, or the network no such layer.
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
        """Forget an expert; its language takes the shared blocks from then on.

        Raises
        ------
        UserError
            Where there is none.
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
        """Return the parts of an expert by side and layer.

        Raises
        ------
        UserError
            Where there is none.
        """
        code = self._loaded(language)
        return {place: block.experts[code] for place, block in self.blocks.items() if code in block.experts}

    def _loaded(self, language: str) -> str:
        code = language_code(language)
        if code not in self.languages:
            there = ", ".join(self.languages) or "none"
            raise UserError(
                f"no expert for '{language}' is loaded (loaded: {there}); load_experts('{language}') loads it"
            )
        return code

    def set_language_task(
        self, language: str | None = None, step_proportion: float | None = None, task: str | None = None
    ) -> None:
        """Choose the expert for all utterances to come, and the language and task that `generate` asks for.

        Arguments
        ---------
        language : str or None
            Code or English name; None for the shared blocks.
        step_proportion : float, optional
            Share of the training that is done, for the noise.
        task : str, optional
            `transcribe` or `translate`, which leaves the decoder to the shared blocks, as in the paper.

        Raises
        ------
        UserError
            Where no expert of this language is loaded.
        """
        code = None if language is None else self._loaded(language)
        self.routing.set("encoder", code)
        self.routing.set("decoder", None if task == "translate" else code)
        if step_proportion is not None:
            self.routing.progress = step_proportion
        self.chosen = {"language": code, "task": task or "transcribe"} if code else {}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, in the language and task of `set_language_task` where none are given.

        With a `language` (or one for each utterance) that has an expert, that one answers this call.
        `config.forced_decoder_ids`, which transformers has given up and would refuse, is dropped: it says the same.
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
        """Write a plain Whisper directory, and a file for each expert."""
        self.config.experts = list(self.languages)
        # other programs read it as what it is without the experts
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
        """Write `expert.<language>.safetensors`: this language's experts and gates, and nothing else.

        Raises
        ------
        UserError
            Where there is no such expert.
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
        """Load one expert or several, and choose the last; one that is there already is replaced.

        Arguments
        ---------
        target_lang : str or list of str
            Codes or English names.
        expert_local_dir : str or Path, optional
            Where `expert.<language>.safetensors` or `.bin` lie; by default where the network came from, directory or hub id.

        Raises
        ------
        UserError
            Where there is no such file, it is damaged, or it belongs to another Whisper.
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
                raise UserError(f"{path} is no expert for this Whisper ({reason})") from None
            self.set_language_task(code)

    @staticmethod
    def _find_expert(code: str, source: str) -> Path:
        names = [f"expert.{name}.{kind}" for kind in ("safetensors", "bin") for name in (LANGUAGES[code], code)]
        for name in names:
            try:
                found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"'{source}' is no directory or hub id that can be reached ({str(error).splitlines()[0]})"
                ) from None
            if found is not None:
                return Path(found)
        raise UserError(f"{source} holds no expert for {LANGUAGES[code]} ({names[0]} or {names[2]})")


def read_expert(path: Path, code: str) -> tuple[dict[str, torch.Tensor], ExpertSettings]:
    """Read an expert's tensors, by `<side>.layers.<i>.<name>`, and what it looks like; of the published layout too.

    Raises
    ------
    UserError
        Where the file is damaged, holds more than tensors, or belongs to another language.
    """
    if path.suffix == ".bin":
        tensors, known = {}, (code, LANGUAGES[code])
        for key, value in load_state(path).items():
            match = _PUBLISHED.fullmatch(key)
            if match and match[4] in known:
                tensors[f"{match[1]}.layers.{match[2]}.{match[3] + '.' if match[3] else ''}{match[5]}"] = value
        if not tensors:
            raise UserError(f"{path} holds no expert for {LANGUAGES[code]} in the published layout")
        places = sorted({tuple(key.split(".")[:3:2]) for key in tensors}, key=lambda p: (SIDES.index(p[0]), int(p[1])))
        width = next((value.shape[0] for key, value in tensors.items() if key.endswith("gate_in.weight")), None)
        if width is None:
            raise UserError(f"{path} holds no gates for {LANGUAGES[code]}; it is not whole")
        return tensors, ExpertSettings([f"{side}.{int(i) + 1}" for side, i in places], None, width)
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or about.get("language") != code:
                raise UserError(
                    f"{path} is no expert for {LANGUAGES[code]} ({about.get('language')}, {about.get('format')})"
                )
            return {key: file.get_tensor(key) for key in file.keys()}, ExpertSettings(**json.loads(about["settings"]))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from None
