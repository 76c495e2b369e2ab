# SPDX-License-Identifier: Apache-2.0
"""What samplers need of a language model, and which models are more than the weights they read."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from gru_fast.gru import GRU

__all__ = [
    "LanguageModel",
    "a_weight",
    "check_language_model",
    "has_own",
    "is_plain",
    "is_read",
    "why_not_layers",
    "why_not_weights",
]


class LanguageModel(Protocol):
    """What sampling needs of a model.

    Attributes:
        vocab_size: V; tokens are 0 ... V - 1.
        gru: The weights of the recurrence; layer 0 is entered through the token table.
        head: (L last layer's H) -> V.
        start: The input id that stands for the zero vector x<1>, which is V.
    """

    vocab_size: int
    gru: GRU
    head: nn.Linear  # or any module: its attributes are for who knows that it is one

    @property
    def start(self) -> int:
        """V."""

    def token_table(self) -> Tensor:
        """(V + 1, N*H): what each input id adds to the gates of layer 0; the last row is x<1>."""

    def run(
        self,
        inputs: Tensor,
        hidden: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        table: Tensor | None = None,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Feed (B, T) input ids: output (T, B, H) of the last layer, and h_n (L, B, H)."""

    def why_not_weights_alone(self) -> str | None:
        """Why `run` is more than the token table and the weights of `gru`; None if it is not.

        What `gru` and `head` are themselves is left to `why_not_layers`.
        """


def check_language_model(model: object, also: str = "") -> None:
    """Raise a TypeError unless generation knows such a model; `also` ends what is expected."""
    if not all(hasattr(model, name) for name in ("gru", "head", "why_not_weights_alone")):
        given = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"model should be a GRULanguageModel{also}, got: {given}")


def a_weight(model: LanguageModel) -> Tensor:
    """A weight of the recurrence, where a model computes and in its dtype.

    The head may be any module: without a weight, or with a method of that name.
    """
    found = next(model.gru.parameters(), None)
    # A replica of DataParallel has no parameters.
    return model.gru._flat_weights[0] if found is None else found


def has_own(module: nn.Module, cls: type[nn.Module], name: str) -> bool:
    """Whether a method is another than that of `cls`: by the class, or on the instance."""
    return getattr(type(module), name) is not getattr(cls, name) or name in module.__dict__


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of a module is nothing but the `forward` of `cls`.

    Global hooks do not count: they are there to look on (FlopCounterMode sets some), and who looks
    on should see what runs otherwise.
    """
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or type(module).forward is not cls.forward
    )


def is_read(gru: Any, embedding: Any) -> bool:
    """Whether the weights of these layers are all that their calls compute with.

    Otherwise a language model calls them: they have hooks, or options that it does not have.
    """
    if not is_plain(gru, GRU) or _why_not_options(gru) is not None:
        return False
    if embedding is None:
        return True
    return is_plain(embedding, nn.Embedding) and not (
        embedding.max_norm is not None
        or embedding.padding_idx is not None
        or embedding.scale_grad_by_freq
        or embedding.sparse
    )


def why_not_weights(name: str, module: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why the weights of a module do not tell what its calls give; None if they do."""
    if type(module).forward is not cls.forward:
        given = type(module).__name__
        if given == cls.__name__:
            given = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"the {name} is a {given}, not {_SHOWN[cls]}"
    if "forward" in module.__dict__:
        return f"the {name} has a forward of its own, which only a call of it runs"
    if module._forward_pre_hooks or module._forward_hooks:
        return (
            f"the {name} has forward hooks, which only a call of it runs (prune.remove and "
            "remove_weight_norm take theirs away, torch.nn.utils.parametrize has none)"
        )
    return None


_SHOWN = {GRU: "a gru_fast.GRU", nn.Embedding: "an nn.Embedding", nn.Linear: "an nn.Linear"}


def why_not_layers(gru: GRU, head: nn.Linear | None = None) -> str | None:
    """Why no sampler can take these layers, on whichever device; None if one may."""
    reason = why_not_weights("gru", gru, GRU)
    if reason is None and head is not None:
        reason = why_not_weights("head", head, nn.Linear)
    return _why_not_options(gru) if reason is None else reason


def _why_not_options(gru: GRU) -> str | None:
    """Why these are more than dense layers in one direction from zeros; None if they are not."""
    if gru.bidirectional:
        return "bidirectional layers need the whole sequence before its first output"
    if gru.num_heads > 1:
        return f"its recurrent weights are dense, and the layers have num_heads={gru.num_heads}"
    if gru.learn_h0:
        return "it starts from zeros, and the layers have learn_h0=True"
    return None
