"""Export a CTC model to transformers: `Wav2Vec2ForCTC`, `HubertForCTC` or `WavLMForCTC` with its processor.

Those classes are an encoder and one linear layer. Models with anything before, between or after them cannot be
expressed, but models with fewer layers can.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCTC,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from efficient_asr.data import SAMPLE_RATE
from efficient_asr.models.ctc import CTCHead, CTCModel
from efficient_asr.models.encoders.ssl import SSLEncoder
from efficient_asr.utils.errors import UserError
from efficient_asr.utils.files import atomic_write

SPACE, BLANK = "|", "<pad>"  # transformers' word delimiter, and its name of the blank


def obstacles(model: CTCModel) -> list[str]:
    """Return what keeps a model from being expressed as an encoder with one linear layer."""
    encoder, head = model.encoder, model.head
    found = []
    if not isinstance(model.frontend, nn.Identity) and not getattr(model.frontend, "is_identity", False):
        found.append(f"a front end ({model.technique})")
    if not isinstance(encoder, SSLEncoder):
        found.append("an encoder that is not a wav2vec 2.0, HuBERT or WavLM")
    elif encoder.features != "cnn":
        found.append("filterbanks instead of convolutions (features: fbank)")
    if encoder.output_norm:
        found.append("a normalisation of the encoder's output (output_norm: True)")
    if type(head) is not CTCHead:
        found.append(f"a head of a technique ({model.technique})")
    elif head.config["block"] != "none" or head.frames_per_state != 1:
        found.append("more than one layer in the head (head_block) or several frames per state (frames_per_state)")
    return found


def export_to_transformers(model: CTCModel, folder: Path) -> None:
    """Write a folder for `AutoModelForCTC` and `AutoProcessor`, with exactly the same logits.

    Arguments
    ---------
    model : CTCModel
        A model of a wav2vec 2.0, HuBERT or WavLM encoder, with `output_norm: False` and `head_block: none`.
    folder : Path
        The folder; written atomically.

    Raises
    ------
    UserError
        If something stands before, between or after encoder and linear layer, naming it.
    """
    found = obstacles(model)
    if found:
        raise UserError(
            f"this model cannot be exported to transformers, whose CTC classes have no place for {'; '.join(found)}. Export it "
            "for SpeechBrain instead, which can run every CTC model of this project"
        )
    if SPACE in model.labels.characters:
        raise UserError(f"this model cannot be exported to transformers: its alphabet contains '{SPACE}'")
    config = copy.deepcopy(model.encoder.model.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = model.encoder.num_layers, len(model.labels), 0
    network = AutoModelForCTC.from_config(config)
    weights = {f"{network.base_model_prefix}.{key}": value for key, value in model.encoder.model.state_dict().items()}
    weights |= {f"lm_head.{key}": value for key, value in model.head.linear.state_dict().items()}
    network.load_state_dict(weights)
    vocabulary = {BLANK: 0} | {SPACE if c == " " else c: i for c, i in model.labels.index.items()}
    with atomic_write(Path(folder)) as partial:
        network.eval().save_pretrained(partial)
        (partial / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(
            str(partial / "vocab.json"), bos_token=None, eos_token=None, unk_token=BLANK, pad_token=BLANK,
            word_delimiter_token=SPACE,
        )  # fmt: skip
        extractor = Wav2Vec2FeatureExtractor(
            sampling_rate=SAMPLE_RATE,
            do_normalize=model.encoder.normalise_input,
            return_attention_mask=config.feat_extract_norm == "layer",
        )
        Wav2Vec2Processor(extractor, tokenizer).save_pretrained(partial)


def largest_difference(model: CTCModel, folder: Path, seconds: float = 1.0) -> float:
    """Return the largest difference between the logits of a model and of its exported folder, on noise."""
    wav = torch.randn(1, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0)) * 0.1
    processor, network = Wav2Vec2Processor.from_pretrained(folder), AutoModelForCTC.from_pretrained(folder).eval()
    with torch.no_grad():
        features = processor(wav[0].numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
        return float((network(features).logits - model.eval().recognise(wav, torch.ones(1)).logits).abs().max())
