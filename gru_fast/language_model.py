# SPDX-License-Identifier: Apache-2.0
"""`GRULanguageModel`: tokens -> GRU -> logits, with teacher forcing, sampling and scoring.

One network, two ways to feed it. Training: x<1> is the zero vector and x<t+1> the TRUE token y<t>,
whatever was predicted. Sampling: x<1> is the zero vector and x<t+1> the token DRAWN at step t.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gru_fast import functional, sampling
from gru_fast.autocast import without_autocast
from gru_fast.checks import check_integers
from gru_fast.gru import GRU
from gru_fast.ops_past import is_unobserved
from gru_fast.recurrent import check_int, check_probability, refuse_tracing, weights_of
from gru_fast.sampled_model import has_own, is_read, why_not_weights
from gru_fast.sampling import GenerateOutput, Streamer
from gru_fast.stack import matching, result_dtype
from gru_fast.token_ids import PADDING, TokenIds

__all__ = ["GRULanguageModel"]

# One-hot inputs of more tokens are compared with all ids, not looked up in a V x V table.
_SMALL_VOCABULARY = 256


def _has_none(ids: Tensor, id: int) -> bool:
    """Whether they can be looked at, and none of them is this one."""
    return (
        type(ids) is Tensor
        and ids.is_cpu
        and is_unobserved()
        and not bool((ids.numpy() == id).any())
    )


class GRULanguageModel(nn.Module):
    """A GRU that predicts the next token.

    The first layer is entered through a table, embedding @ weight_ih^T + bias_ih with a row for
    every token: no product over the T * B inputs is computed where the vocabulary is smaller.

    Args:
        vocab_size: V; tokens are 0 ... V - 1.
        embedding_size: Features E of a token's embedding. None: one-hot inputs, no embedding.
        hidden_size: Features H of the hidden state.
        num_layers: Stacked layers L.
        cell: As in `gru_fast.GRU`.
        bias: Whether the GRU has biases; the head always has one.
        dropout: Probability of the dropout after every layer, the last one included, in
            training mode.
        tie_weights: `head.weight` is `embedding.weight`; needs embedding_size == hidden_size.
        backend: As in `gru_fast.GRU`.
        recompute: As in `gru_fast.GRU`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        embedding: `nn.Embedding` (V, E), or None.
        gru: `gru_fast.GRU`, which holds the weights of the layers. Where it or the embedding has
            hooks, another `forward` or options that this class does not set (`learn_h0`,
            `num_heads`; `max_norm`, `padding_idx`, `sparse`), both are called; otherwise their
            weights are read. It has one direction, in training no `recurrent_dropout`, and
            `dropout` is the model's.
        head: `nn.Linear` from H to V. Any module may take its place, and is called.
        config: The arguments above but device and dtype: `GRULanguageModel(**model.config)`.

    Raises:
        ValueError: A size is not positive, `dropout` is outside [0, 1], `tie_weights` does not
            fit, or `cell` or `backend` is unknown.
        TypeError: A size is not an int.

    Example:
        >>> model = GRULanguageModel(28, None, 64)
        >>> loss = model.loss(torch.tensor([[3, 1, 20, 0], [5, 0, -100, -100]]))
        >>> tokens = model.generate(max_new_tokens=10, eos_token_id=0, seed=1)
    """

    needs_fast_gru = True
    """`gru_fast.revert` leaves `gru` as it is."""

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int | None,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: str = "reset_after",
        bias: bool = True,
        dropout: float = 0.0,
        tie_weights: bool = False,
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        sizes = {"vocab_size": vocab_size}
        if embedding_size is not None:
            sizes["embedding_size"] = embedding_size
        for name, size in sizes.items():
            check_int(name, size)
            if size < 1:
                raise ValueError(f"{name}: expected >= 1, got {size}")
        check_probability("dropout", dropout)
        if tie_weights and embedding_size != hidden_size:
            raise ValueError(
                "tie_weights: expected embedding_size == hidden_size, got "
                f"embedding_size={embedding_size}, hidden_size={hidden_size}"
            )
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "cell": cell,
            "bias": bias,
            "dropout": dropout,
            "tie_weights": tie_weights,
            "backend": backend,
            "recompute": recompute,
        }
        self.vocab_size = vocab_size
        self.dropout = dropout
        self.embedding: nn.Embedding | None = None
        if embedding_size is not None:
            self.embedding = nn.Embedding(vocab_size, embedding_size, device=device, dtype=dtype)
        self.gru = GRU(
            embedding_size or vocab_size,
            hidden_size,
            num_layers,
            bias,
            device=device,
            dtype=dtype,
            cell=cell,
            backend=backend,
            recompute=recompute,
        )
        self.head = nn.Linear(hidden_size, vocab_size, device=device, dtype=dtype)
        if tie_weights:
            assert self.embedding is not None
            with torch.no_grad():
                self.embedding.weight.copy_(self.head.weight)
            self.head.weight = self.embedding.weight

    @property
    def start(self) -> int:
        """The input id that stands for the zero vector x<1>: vocab_size."""
        return self.vocab_size

    def extra_repr(self) -> str:
        """The options that the submodules do not show."""
        weights = [getattr(part, "weight", None) for part in (self.embedding, self.head)]
        tied = weights[0] is not None and weights[0] is weights[1]
        return f"dropout={self.dropout}, tie_weights={tied}"

    def token_table(self) -> Tensor:
        """(V + 1, N*H): what each input id adds to the gates of the first layer.

        Row v is embedding[v] @ weight_ih^T + bias_ih (without the embedding for one-hot inputs);
        the last row, for x<1> = 0, is bias_ih alone.
        """
        return self._table_of(weights_of(self.gru))

    def _table_of(self, weights: list[Tensor]) -> Tensor:
        """`token_table` of `gru`'s weights."""
        weight, bias = self._entering(weights)
        with without_autocast("cpu"):
            embedding = self.embedding
            rows = weight.T if embedding is None else embedding.weight @ weight.T
            table = F.pad(rows, (0, 0, 0, 1))
            return table if bias is None else table + bias

    def why_not_weights_alone(self) -> str | None:
        """Why `run` is more than `token_table` and the weights of `gru`; None if it is not."""
        if has_own(self, GRULanguageModel, "run"):
            return f"the {type(self).__name__} has a run of its own"
        embedding = self.embedding
        if embedding is None:
            return None
        if getattr(embedding, "max_norm", None) is not None:
            return "the embedding has max_norm, which only a call of it keeps to"
        return why_not_weights("embedding", embedding, nn.Embedding)

    def _entering(self, weights: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return weights[0], weights[2] if self.gru.bias else None

    def _input_gates(self, inputs: Tensor, table: Tensor | None, weights: list[Tensor]) -> Tensor:
        """(T, B, N*H) for (T, B) input ids, by `gru`'s weights."""
        if table is None and has_own(self, GRULanguageModel, "token_table"):
            table = self.token_table()
        if table is None and self.embedding is not None and inputs.numel() < self.vocab_size:
            with without_autocast("cpu"):
                return F.linear(self._features(inputs), *self._entering(weights))
        # The gradient of F.embedding is added up in the order of the tokens: no atomics.
        return F.embedding(inputs, self._table_of(weights) if table is None else table)

    def _features(self, inputs: Tensor, called: bool = False) -> Tensor:
        """What input ids stand for, (..., E) or one-hot (..., V): zeros for `start`."""
        embedding, V = self.embedding, self.vocab_size
        if embedding is None:
            dtype = self.gru._flat_weights[0].dtype
            if called:  # no operator after it would refuse an id outside its range
                if V <= _SMALL_VOCABULARY:
                    eye = torch.eye(V + 1, V, dtype=dtype, device=inputs.device)
                    return F.embedding(inputs, eye)
                F.embedding(inputs, torch.empty(V + 1, 1, device=inputs.device))
            return (inputs[..., None] == torch.arange(V, device=inputs.device)).to(dtype)
        if called and _has_none(inputs, V):
            return embedding(inputs)  # type: ignore[no-any-return]
        zero = inputs == V
        ids = inputs.masked_fill(zero, 0)
        x: Tensor = embedding(ids) if called else F.embedding(ids, embedding.weight)
        return x.masked_fill(zero[..., None], 0.0)

    def _call_layers(
        self, inputs: Tensor, hidden: Tensor | None, lengths: Tensor | None, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """`run` by calls of `embedding` and `gru`, for hooks and other ways to go forward."""
        gru = self.gru
        given = {} if lengths is None else {"lengths": lengths}
        x = self._features(inputs if gru.batch_first else inputs.T, called=True)
        # The model's dropout is not an option of `gru`: scoring is without it in any mode.
        wanted = {"dropout": dropout, "recurrent_dropout": 0.0}
        before = {name: getattr(gru, name, value) for name, value in wanted.items()}
        changed = [name for name in wanted if wanted[name] != before[name]]
        for name in changed:
            setattr(gru, name, wanted[name])
        try:
            output, h_n = gru(x, hidden, **given)
        finally:
            for name in changed:
                setattr(gru, name, before[name])
        if gru.batch_first:
            output = output.transpose(0, 1)
        return F.dropout(output, dropout) if dropout else output, h_n

    def run(
        self,
        inputs: Tensor,
        hidden: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        table: Tensor | None = None,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Feed input ids to the layers, without the head.

        Args:
            inputs: (B, T) int64, 0 <= id < V, or `start` for the zero vector.
            hidden: (L, B, H) state before the first step; None means zeros.
            lengths: (B,), as in `gru_fast.GRU`.
            table: `token_table()`, where it is at hand; not used where the layers are called.
            dropout: Probability of the dropout after every layer.

        Returns:
            The last layer's output, (T, B, H), and h_n (L, B, H).

        Raises:
            RuntimeError: Shapes that do not fit, a named backend that cannot take the call, or a
                `gru` with two directions.
            TypeError: A weight of `gru` is missing.
            IndexError: An id is outside its range (on the CPU).
        """
        refuse_tracing("GRULanguageModel")
        if inputs.dim() != 2:
            raise RuntimeError(f"inputs: expected 2 dimensions (B, T), got {inputs.dim()}")
        gru, embedding = self.gru, self.embedding
        L, H, per = gru.num_layers, gru.hidden_size, 4 if gru.bias else 2
        if hidden is not None and hidden.shape != (L, inputs.shape[0], H):
            raise RuntimeError(
                f"hidden: expected shape {(L, inputs.shape[0], H)}, got {tuple(hidden.shape)}"
            )
        if gru.bidirectional:
            raise RuntimeError("gru: expected one direction, got bidirectional=True")
        if not is_read(gru, embedding):
            return self._call_layers(inputs, hidden, lengths, dropout)
        weights = weights_of(gru)
        # ONNX's GRU projects its input itself: given gates, it would multiply them by an identity.
        exporting = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
        features = exporting and weights[0].shape[1] <= weights[0].shape[0]
        if features:
            entering = self._features(inputs.T)
        else:
            entering = self._input_gates(inputs.T, table, weights)
        if hidden is None:
            hidden = entering.new_zeros(L, inputs.shape[0], H)
        dtype = hidden.dtype
        if dtype != weights[0].dtype and hidden.is_cpu:
            entering, hidden = matching(entering, hidden, weights[0])
        if features:
            output, h_n = functional.gru(
                entering, hidden[:1], weights[:per], bias=gru.bias, lengths=lengths, cell=gru.cell
            )
        else:
            output, h_n = functional.scan(
                entering.unsqueeze(2),
                hidden[:1],
                weights[1].unsqueeze(0),
                weights[3].unsqueeze(0) if gru.bias else None,
                lengths=lengths,
                cell=gru.cell,
                recompute=gru.recompute,
                backend=gru.backend,
            )
        if dropout:
            output = F.dropout(output, dropout)
        if L > 1:
            output, above = functional.gru(
                output, hidden[1:], weights[per:], num_layers=L - 1, bias=gru.bias,
                dropout=dropout, training=True, cell=gru.cell, backend=gru.backend,
                recompute=gru.recompute, lengths=lengths,
            )  # fmt: skip
            if dropout:
                output = F.dropout(output, dropout)
            h_n = torch.cat([h_n, above])
        if output.dtype != dtype and output.is_cpu:
            dtype = result_dtype(dtype)
            return output.to(dtype), h_n.to(dtype)
        return output, h_n

    def forward(self, inputs: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the token that follows each input.

        Args:
            inputs: (B, T) int64, 0 <= id < V, or `start` (= V) for the zero vector x<1>.
            hidden: (L, B, H) state before the first step; None means zeros.

        Returns:
            logits (B, T, V), and the state (L, B, H) after the last step.

        Raises:
            RuntimeError: As `run`; or `gru` has `recurrent_dropout`, in training mode.
            IndexError: An id is outside its range (on the CPU).
        """
        if self.training and getattr(self.gru, "recurrent_dropout", False):
            raise RuntimeError(
                "gru: expected recurrent_dropout=0 in training mode, got "
                f"recurrent_dropout={self.gru.recurrent_dropout}"
            )
        output, h_n = self.run(inputs, hidden, dropout=self.dropout if self.training else 0.0)
        return self.head(output).transpose(0, 1), h_n

    def teacher_forcing(self, tokens: Tensor) -> Tensor:
        """The inputs whose targets are `tokens` (B, T): the zero vector, then the true tokens."""
        first = tokens.new_full((tokens.shape[0], 1), self.start)
        # Where nothing is to be said the input does not matter. PADDING before a token stays, an
        # id that is refused.
        before = tokens[:, :-1].masked_fill(tokens[:, 1:] == PADDING, 0)
        return torch.cat([first, before], 1)[:, : tokens.shape[1]]

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, over the real tokens of whole sequences.

        Args:
            tokens: (B, T) int64 or narrower, each row from its first token to its EOS, then
                PADDING (-100).

        Returns:
            A scalar; NaN without a single real token.

        Raises:
            TypeError: `tokens` is not a tensor of integers.
            ValueError: It has not two dimensions.
            IndexError: A token is outside its range, or follows PADDING (on the CPU).
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens should be a Tensor, got: {type(tokens).__name__}")
        check_integers("tokens", tokens)
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected 2 dimensions (B, T), got {tokens.dim()}")
        tokens = tokens.long()
        logits, _ = self(self.teacher_forcing(tokens))
        # Both time-major, as the logits lie in memory.
        logits = logits.transpose(0, 1).flatten(0, 1)
        return F.cross_entropy(logits, tokens.T.flatten(), ignore_index=PADDING)

    @overload
    def generate(
        self,
        input_ids: TokenIds | None = None,
        *,
        max_new_tokens: int,
        num_return_sequences: int = 1,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        input_ids: TokenIds | None = None,
        *,
        max_new_tokens: int,
        num_return_sequences: int = 1,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[True],
    ) -> GenerateOutput: ...

    def generate(
        self, input_ids: TokenIds | None = None, **options: Any
    ) -> Tensor | GenerateOutput:
        """Draw tokens until EOS or the limit; dropout is off, no gradient is recorded.

        A seed means the same random numbers for ever: that of token number t of row i depends on
        the seed, i and its position in the row (the prompt counts) only. Which token it falls on is
        up to the logits, whose last bits can differ between processors and devices. Tokens come
        from `run` and `head`; hooks of the model itself, and another `forward` of it, are not for
        this.

        Args:
            input_ids: Prompts: a (P,) or (N, P) integer tensor with PADDING (-100) on the right, a
                list of ids or a list of such lists. None: one empty prompt.
            **options: By keyword only:
                max_new_tokens: Tokens to draw at most in each row; required.
                num_return_sequences: Rows for each prompt, next to each other.
                do_sample: False takes the most likely token instead, the lowest id among equals.
                temperature: The logits are divided by it, > 0, within the range of float32.
                top_k: Keep the k most likely tokens.
                top_p: Keep the shortest prefix of the ranking that holds this share, in (0, 1].
                min_p: Keep what is at least min_p times as likely as the likeliest.
                eos_token_id: The token that ends a row. None: nothing does.
                seed: Any integer. None: drawn from `generator`.
                generator: A `torch.Generator`; None: the default one. It advances by one draw.
                streamer: `put(tokens)` for the prompts and after every step, `end()` at the end.
                return_dict_in_generate: Return a `GenerateOutput`.

        Returns:
            (N, L) int64: prompt, drawn tokens, PADDING after EOS; or a `gru_fast.GenerateOutput`
            with these `sequences`, the `log_probs` of the drawn tokens, the `hidden` state and the
            `prompt_lengths`.

        Raises:
            ValueError: An option or an id is outside its range, `seed` and `generator` are both
                given, or the logits hold NaN or +inf.
            TypeError: An unknown option, one of another type, or ids that are not integers.
            RuntimeError: `gru` is no layer of gru_fast.
        """
        return sampling.generate(self, input_ids, **options)

    def score(self, sequences: TokenIds, *, prompt_lengths: Tensor | None = None) -> Tensor:
        """Log-probabilities of the tokens under teacher forcing; dropout is off, no gradient.

        `score(out.sequences, prompt_lengths=out.prompt_lengths)` is `out.log_probs` for every
        `out = generate(..., return_dict_in_generate=True)`: in float32 within 1e-5, or 1e-6 of
        the largest logit where that is more. A model of bfloat16 or float16, or under autocast,
        rounds here, where the native loop does not: some thousandths apart. So does a head of
        dynamic quantization, whose scale is that of all that a call brings.

        Args:
            sequences: As `input_ids` of `generate`.
            prompt_lengths: (N,): count only what comes after. None counts all tokens.

        Returns:
            (N, L), 0 at padding and in prompts: natural logarithm of each token's probability
            given those before it, in float32 or better.

        Raises:
            ValueError: An id is outside its range, or a shape does not fit.
            TypeError: Ids that are not integers, or `prompt_lengths` no tensor of them.
        """
        return sampling.score(self, sequences, prompt_lengths=prompt_lengths)
