r"""Audio context: the technique's derivation, its loss, and its part of a model folder.

A plain Whisper (Radford et al., arXiv 2212.04356) needs the silence that pads every utterance to 30 s: without it, the model
repeats itself, because encoder and decoder attend to it. FUTO's audio-context fine-tuning (github.com/futo-org/whisper-acft;
no paper) teaches a copy of the model to do without. Only audio is needed: the padded model is the teacher, and its transcript
is the text.

Let :math:`e_t` be the teacher's encoder states at the :math:`n` positions of the audio, and :math:`h^l_j` its decoder's states
(layer :math:`l` of :math:`0 \dots L`, token :math:`j` of :math:`m`) with the teacher's greedy text as input, and
:math:`\hat e, \hat h` those of the student, which encodes the audio and a random, short silence. With :math:`d` the width and
:math:`p, \hat p` the distributions of the next token, the loss is

.. math::
    L = \frac{w_e}{n d} \sum_t \lVert \hat e_t - e_t \rVert^2
      + \frac{w_d}{(L + 1) m d} \sum_{l, j} \lVert \hat h^l_j - h^l_j \rVert^2
      + \frac{w_p}{m} \sum_j KL(p_j \,\Vert\, \hat p_j),

averaged over the positions and tokens of a batch.

The text is the teacher's transcript, encoded as training encodes texts (without a space in front).

Deviations: FUTO matches the decoder's states (:math:`w_e = w_p = 0`) on the reference texts. Here the text is the teacher's own,
so that audio is enough, and the silence is drawn from a range, so that the model can be used with any length in it. Which layers
learn is a setting; convolutions, positions and embeddings stay as they are unless all learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from efficient_asr.models.whisper.own_length import OwnLength
from efficient_asr.techniques.distillation.losses import kl_divergence


class AudioContext(OwnLength):
    """Encode each utterance on its own length, with a model trained for it.

    Arguments
    ---------
    padding_s : float
        Silence behind each utterance in seconds.
    """

    technique = "audio_context"

    @property
    def label(self) -> str:
        """Variant, for the tables."""
        return f"audio context + {self.padding_s:g} s"


@dataclass
class States:
    """What the teacher or the student computed for a batch.

    Attributes
    ----------
    encoder : torch.Tensor
        Last states of the encoder, [batch, positions, dim].
    decoder : torch.Tensor
        States of the decoder, [batch, tokens, layers + 1, dim]; the last one after the final layer norm.
    logits : torch.Tensor
        [batch, tokens, vocabulary].
    """

    encoder: torch.Tensor
    decoder: torch.Tensor
    logits: torch.Tensor


def context_loss(
    student: States, teacher: States, positions: torch.Tensor, tokens: torch.Tensor, weights: tuple[float, float, float]
) -> torch.Tensor:
    """Return the loss of a batch.

    Arguments
    ---------
    student, teacher : States
        The states to be matched; terms with a weight of 0 are not computed.
    positions, tokens : torch.Tensor
        Which encoder positions [batch, positions] and tokens [batch, tokens] are real.
    weights : tuple of float
        Of encoder states, decoder states and distributions.
    """
    encoder, decoder, logits = weights
    loss = student.encoder.new_zeros(())
    if encoder:
        loss = loss + encoder * (student.encoder - teacher.encoder)[positions].pow(2).mean()
    if decoder:
        loss = loss + decoder * (student.decoder - teacher.decoder)[tokens].pow(2).mean()
    if logits:
        pair = [each.logits[tokens].log_softmax(dim=-1) for each in (teacher, student)]
        loss = loss + logits * kl_divergence(*pair).mean()
    return loss
