"""
The history of a stream: History Marker, History Compressor and History Decoder, and the constant-size state they keep.

Letters: B batch, T frames, n objects, S = h * w pixels of a map, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ausm import AusmConfig
from .maps_ausm import average_maps, average_tokens, channels_first, channels_last, to_maps, to_tokens
from .temporal_mamba import TemporalMamba, TemporalMamba2


@dataclass
class AusmHistory:
    """
    All that a stream remembers. Its size depends on the frame size and on the number of objects followed at the same
    time, never on the number of frames seen. Nothing is changed in place: a step returns a new history.

    Attributes:
        features (`torch.Tensor` of shape `(B, D, H / 8, W / 8)`, *optional*):
            `X_{t-1}`, the features of the previous frame. `None` before the first frame, where the learned `X_0`
            stands in.
        states (`tuple`, *optional*):
            The Mamba state of each compressor layer, a pair of tensors with a row for each pixel of each stream's
            map of stride `history_stride`. `None` before the first frame.
        slots (`torch.LongTensor` of shape `(B, n)`):
            `A_{t-1}`: which vector of the buffer `B` each object holds.
        taken (`torch.BoolTensor` of shape `(B, n)`):
            False where a column is only padding.
        masks (`torch.Tensor` of shape `(B, n, height, width)`):
            `M_{t-1}`: the mask of each object in the previous frame, in [0, 1], at any resolution; all zeros where
            the object was absent.
        appearance (`torch.FloatTensor` of shape `(B, 2, D + 1 + num_id_vectors + 1, D + 1)`, *optional*):
            What each slot's object and, last, the background looked like up to frame t - 2: see [`AusmAppearance`].
            `None` before the first frame, and without `remember_appearance`.
    """

    features: Tensor | None
    states: tuple[tuple[Tensor, ...], ...] | None
    slots: Tensor
    taken: Tensor
    masks: Tensor
    appearance: Tensor | None = None

    @classmethod
    def empty(cls, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> AusmHistory:
        """The history of a stream before its first frame, without objects."""
        return cls(
            features=None,
            states=None,
            slots=torch.zeros(batch_size, 0, dtype=torch.long, device=device),
            taken=torch.zeros(batch_size, 0, dtype=torch.bool, device=device),
            masks=torch.zeros(batch_size, 0, 1, 1, dtype=dtype, device=device),
        )

    def is_of(self, config: AusmConfig) -> bool:
        """Whether it has the sizes of the histories that a network of this configuration makes."""
        if self.features is None or self.states is None:
            return True
        looks = None
        if config.remember_appearance:
            looks = (2, config.hidden_size + config.num_id_vectors + 2, config.hidden_size + 1)
        return (
            self.features.shape[1] == config.hidden_size
            and len(self.states) == config.num_compressor_layers
            and looks == (None if self.appearance is None else self.appearance.shape[1:])
        )

    @classmethod
    def join(cls, histories: list[AusmHistory]) -> AusmHistory:
        """Those of several streams, all before or all after their first frame, as a batch; columns that one lacks are
        padding."""
        if len(histories) == 1:
            return histories[0]
        most = max(history.slots.shape[1] for history in histories)
        missing = [most - history.slots.shape[1] for history in histories]
        features = states = appearance = None
        if histories[0].features is not None:
            features = torch.cat([history.features for history in histories])
            states = tuple(
                tuple(map(torch.cat, zip(*layers))) for layers in zip(*(history.states for history in histories))
            )
        if histories[0].appearance is not None:
            appearance = torch.cat([history.appearance for history in histories])
        return cls(
            features,
            states,
            slots=torch.cat([F.pad(history.slots, (0, n)) for history, n in zip(histories, missing)]),
            taken=torch.cat([F.pad(history.taken, (0, n)) for history, n in zip(histories, missing)]),
            masks=torch.cat([F.pad(history.masks, (0, 0, 0, 0, 0, n)) for history, n in zip(histories, missing)]),
            appearance=appearance,
        )

    def split(self, numbers: list[int]) -> list[AusmHistory]:
        """
        Those of the streams of a batch after a frame, which follow `numbers` objects, without padding. Each has memory
        of its own: a stream that goes on keeps nothing of the others.
        """
        if len(numbers) == 1:
            return [self]
        assert self.features is not None and self.states is not None
        states = [tuple(zip(*(tensor.chunk(len(numbers)) for tensor in layer))) for layer in self.states]
        appearance = [None] * len(numbers) if self.appearance is None else self.appearance.split(1)
        return [
            AusmHistory(
                features,
                tuple(layer[i] for layer in states),
                self.slots[i : i + 1, :number],
                self.taken[i : i + 1, :number],
                self.masks[i : i + 1, :number],
                appearance[i],
            )._each(torch.clone)
            for i, (number, features) in enumerate(zip(numbers, self.features.split(1)))
        ]

    def replace_objects(self, slots: Tensor, taken: Tensor, masks: Tensor) -> AusmHistory:
        """The same past with other objects: what `A` and `M` are after a frame is the caller's decision."""
        if slots.shape != taken.shape or slots.shape != masks.shape[:2] or masks.ndim != 4:
            raise ValueError(
                "`slots` and `taken` must have shape (B, n) and `masks` (B, n, height, width), got "
                f"{tuple(slots.shape)}, {tuple(taken.shape)} and {tuple(masks.shape)}."
            )
        return replace(self, slots=slots, taken=taken, masks=masks)

    def forget_appearance(self, columns: list[int]) -> AusmHistory:
        """
        The same past without what the objects of these columns looked like. Their pixels were nobody's then, but for
        what their mean says: who is found or marked there again must not be taught to be unlike itself.
        """
        if not columns or self.appearance is None:
            return self
        appearance = self.appearance.clone()
        width = appearance.shape[-1]
        for averages, slots in zip(appearance, self.slots[:, columns].tolist()):
            sums = averages[:, width:][:, slots]  # of looks whose last number is 0.5
            # A sum of products is at least the product of the sums by their number: what is left stays positive.
            averages[:, :width] -= (sums / (2 * sums[..., -1:]).clamp(min=1e-6)).mT @ sums
            averages[:, width:][:, slots] = 0
        return replace(self, appearance=appearance)

    def to(self, device: torch.device | str) -> AusmHistory:
        """The same past on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for saving, exporting and counting bytes."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "states"}
        for layer, state in enumerate(self.states or ()):
            named |= {f"states.{layer}.{index}": tensor for index, tensor in enumerate(state)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def detach(self) -> AusmHistory:
        """The same history without its graph: what one training clip passes to the next."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> AusmHistory:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "states"}
        changed = {name: None if tensor is None else change(tensor) for name, tensor in changed.items()}
        states = self.states and tuple(tuple(map(change, state)) for state in self.states)
        return replace(self, **changed, states=states)

    @property
    def num_bytes(self) -> int:
        """Memory of the stream in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


torch.export.register_dataclass(AusmHistory)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out; `attention_mask` is boolean, True where a query may look."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class AusmAttention(nn.Module):
    """Multi-head attention with positions added to queries and keys, through transformers' attention interface."""

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        `query` (N, Q, D), `key` and `value` (N, S, D), `attention_mask` bool, broadcastable to (N, 1, Q, S). Returns
        (N, Q, D) and, of eager attention alone, the weights (N, heads, Q, S).
        """
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if attention_mask is not None and "flash" in self.config._attn_implementation:
            interface = ALL_ATTENTION_FUNCTIONS["sdpa"]  # flash attention has no masks of this kind
        split = (query.shape[0], -1, self.num_heads, self.head_dim)
        output, weights = interface(
            self,
            self.q_proj(query).view(split).transpose(1, 2),
            self.k_proj(key).view(split).transpose(1, 2),
            self.v_proj(value).view(split).transpose(1, 2),
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            is_causal=False,
        )
        return self.out_proj(output.reshape(query.shape)), weights


class AusmFeedForward(nn.Module):
    def __init__(self, hidden_size: int, feedforward_size: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, feedforward_size)
        self.activation = ACT2FN[activation]
        self.fc2 = nn.Linear(feedforward_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


def binarize(small_masks: Tensor) -> Tensor:
    """
    Masks as they enter the history, in training and in a stream: of masks (..., h, w) that give the covered share of
    each cell, the cells that are at least half covered; of an object so thin that there are none, the best covered.
    """
    threshold = small_masks.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-6, max=0.5)
    return (small_masks >= threshold).to(small_masks.dtype)


def mark_history(id_vectors: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """
    The History Marker: paints each ID vector onto the pixels of its mask,
    `S[h, w] = sum_i M_i[h, w] A_i / (eps + sum_i M_i[h, w])`, with an `eps` of 1e-6.

    It is evaluated at the resolution of the masks and then averaged over the area of each cell, so a thin object marks
    a cell by the fraction that it covers. The sum counts as 1 at least: for binary masks that changes nothing, without
    it the least trace of another mask, far from its object, would be as loud as the object.

    Args:
        id_vectors (`torch.Tensor` of shape `(N, n, D)`): `A_{t-1}`.
        masks (`torch.Tensor` of shape `(N, n, height, width)`): `M_{t-1}` in [0, 1], at any resolution.
        size (`tuple[int, int]`): Height and width of the marks.

    Returns:
        `torch.Tensor` of shape `(N, D, *size)`; zeros where no mask is.
    """
    if masks.shape[1] == 0:
        return id_vectors.new_zeros(masks.shape[0], id_vectors.shape[-1], *size)
    shares = masks / (1e-6 + masks.sum(dim=1, keepdim=True)).clamp(min=1)
    shares = average_maps(shares, size).to(id_vectors.dtype)
    return to_maps(torch.bmm(shares.flatten(2).mT, id_vectors), size)


class AusmCompressorLayer(GradientCheckpointingLayer):
    """Mamba over time for each pixel alone, self-attention over space for each frame alone, feed-forward."""

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.key_stride = config.history_key_stride
        sizes = {
            "state_size": config.mamba_state_size,
            "conv_kernel": config.mamba_conv_kernel,
            "expand": config.mamba_expand,
        }
        self.temporal_norm = nn.LayerNorm(config.hidden_size)
        self.temporal_mixer: TemporalMamba | TemporalMamba2
        if config.temporal_mixer == "mamba2":
            self.temporal_mixer = TemporalMamba2(config.hidden_size, head_dim=config.mamba_head_dim, **sizes)
        else:
            self.temporal_mixer = TemporalMamba(config.hidden_size, **sizes)
        self.spatial_norm = nn.LayerNorm(config.hidden_size)
        self.spatial_attention = AusmAttention(config)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size)
        self.feedforward = AusmFeedForward(config.hidden_size, config.history_feedforward_size, "gelu")

    def forward(
        self, hidden_states: Tensor, positions: Tensor, size: tuple[int, int], state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        batch, frames, pixels, _ = hidden_states.shape

        # B T S D -> (B S) T D: a sequence per pixel
        sequences = self.temporal_norm(hidden_states).transpose(1, 2).flatten(0, 1)
        mixed, state = self.temporal_mixer(sequences, state)
        hidden_states = hidden_states + mixed.view(batch, pixels, frames, -1).transpose(1, 2)

        # B T S D -> (B T) S D: a sequence per frame
        hidden_states = hidden_states.flatten(0, 1)
        values = self.spatial_norm(hidden_states)
        queries = values + positions
        keys, values = (average_tokens(x, size, self.key_stride) for x in (queries, values))
        hidden_states = hidden_states + self.spatial_attention(queries, keys, values)[0]
        hidden_states = hidden_states + self.feedforward(self.feedforward_norm(hidden_states))
        return hidden_states.view(batch, frames, pixels, -1), state


class AusmHistoryDecoderLayer(GradientCheckpointingLayer):
    """The current frame asks the compressed past."""

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.key_stride = config.history_key_stride
        self.self_attention: AusmAttention | None = None
        if config.history_self_attention:
            self.self_norm = nn.LayerNorm(config.hidden_size)
            self.self_attention = AusmAttention(config)
        self.cross_norm = nn.LayerNorm(config.hidden_size)
        self.cross_attention = AusmAttention(config)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size)
        self.feedforward = AusmFeedForward(config.hidden_size, config.history_feedforward_size, "gelu")

    def forward(
        self, hidden_states: Tensor, keys: Tensor, values: Tensor, positions: Tensor, size: tuple[int, int]
    ) -> Tensor:
        if self.self_attention is not None:
            own_values = self.self_norm(hidden_states)
            queries = own_values + positions
            own_keys, own_values = (average_tokens(x, size, self.key_stride) for x in (queries, own_values))
            hidden_states = hidden_states + self.self_attention(queries, own_keys, own_values)[0]
        queries = self.cross_norm(hidden_states) + positions
        hidden_states = hidden_states + self.cross_attention(queries, keys, values)[0]
        return hidden_states + self.feedforward(self.feedforward_norm(hidden_states))


class AusmMarkReadout(nn.Module):
    """
    How much of each ID vector the history sees at each pixel, as a logit: the product of the vector, as it is painted,
    with what the history says. Followed objects' masks start from it, so whose pixel is whose needs no learning.
    """

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.scaling = config.hidden_size**-0.5
        self.projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, id_vectors: Tensor, change: Tensor) -> Tensor:
        """ID vectors (N, n, D) and `G - X` (N, D, h, w) to logits (N, n, h, w)."""
        return torch.einsum("nid,ndhw->nihw", self.projection(id_vectors) * self.scaling, change) + self.offset


class AusmMaskPropagation(nn.Module):
    """
    Carries the masks of the previous frame to where their pixels are now: attention of each pixel to the square of
    side `2 * radius + 1` around its place in the previous frame, by how alike they are, whose values are the masks
    themselves. So each followed object's logits start from its own outline, and nothing of it has to pass through the
    ID vectors.
    """

    BLOCK = 4  # pixels that are looked up together, in each direction; divides every stride-8 map

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.radius = config.mask_propagation_radius
        self.projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.log_sharpness = nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.zeros(1))
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor, previous: Tensor, shares: Tensor, known: Tensor) -> Tensor:
        """
        Args:
            features, previous (`torch.Tensor` of shape `(N, D, h, w)`): `X_t` and `X_{t-1}`.
            shares (`torch.Tensor` of shape `(N, n, h, w)`): What share of each cell `M_{t-1}` covers.
            known (`torch.BoolTensor` of shape `(N, n)`): Whether `M_{t-1}` says where an object was, or that it was
                away.

        Returns:
            Logits of shape `(N, n, h, w)`; 0 for an object of which it says neither, which may be anywhere.
        """
        height, width = features.shape[-2:]
        queries, keys = (
            F.normalize(self.projection(channels_last(x)), dim=-1).to(features.dtype) for x in (features, previous)
        )
        scores = self._blocks(queries * self.log_sharpness.exp()) @ self._windows(keys).mT
        inside = self._windows(shares.new_ones(1, height, width, 1)).mT > 0
        weights = scores.masked_fill(~(self._near(scores.device) & inside), -torch.inf).softmax(-1)
        moved = weights @ self._windows(channels_last(shares))  # (N, blocks, BLOCK^2, n)
        moved = moved.unflatten(2, (self.BLOCK, self.BLOCK)).unflatten(1, (height // self.BLOCK, width // self.BLOCK))
        moved = moved.permute(0, 5, 1, 3, 2, 4).reshape(shares.shape)
        return (self.scale * moved + self.offset) * known[..., None, None]

    def _blocks(self, maps: Tensor) -> Tensor:
        """Maps (N, h, w, C) as blocks of tokens (N, blocks, BLOCK^2, C)."""
        blocks = maps.unflatten(2, (-1, self.BLOCK)).unflatten(1, (-1, self.BLOCK))
        return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _windows(self, maps: Tensor) -> Tensor:
        """What lies in and around each block of maps (N, h, w, C): (N, blocks, side^2, C)."""
        side = self.BLOCK + 2 * self.radius
        maps = F.pad(maps, (0, 0, *(self.radius,) * 4))
        windows = maps.unfold(1, side, self.BLOCK).unfold(2, side, self.BLOCK)  # (N, ., ., C, side, side)
        return windows.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(1, 2)

    def _near(self, device: torch.device) -> Tensor:
        """Which pixels of its window each pixel of a block looks at, bool (BLOCK^2, side^2)."""
        places = torch.arange(self.BLOCK, device=device)
        window = torch.arange(self.BLOCK + 2 * self.radius, device=device) - self.radius
        near = (window - places[:, None]).abs() <= self.radius
        return (near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)


class AusmAppearance(nn.Module):
    """
    What each followed object looks like, wherever it is: a linear classifier from a pixel's features to whose pixel it
    is, fitted to the frames so far by ridge regression, as few-shot learners do (R2D2, arXiv 1805.08136). So an object
    that was hidden is known again, and who crosses it doesn't take it over.

    In each frame, each object and the background count the same, whatever their size. The sums over pixels that the
    regression needs are the mean of two averages over frames: one of the first frame alone that shows an object, which
    is right where later masks may have drifted, and one that follows how it looks now. These are all that a stream
    keeps, and both forms compute the same. When nobody is left whom they are of, they begin anew.
    """

    FADING = (0.9995, 0.98)  # weight of a frame in each of the two averages, relative to the frame after it
    RIDGE = 0.03
    SOLVER_STEPS = 14  # with this ridge and a hundred objects, to the precision of float32

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.num_slots = config.num_id_vectors
        self.scale = nn.Parameter(torch.zeros(1))

    def describe(self, features: Tensor) -> Tensor:
        """What is classified: features (..., D, h, w) to float32 (..., S, R) of the same length, and a constant."""
        looks = channels_last(features).flatten(-3, -2).float().contiguous()
        return F.pad(F.normalize(looks, dim=-1), (0, 1), value=0.5)

    def forward(
        self,
        features: Tensor,
        previous: Tensor,
        shares: Tensor,
        slots: Tensor,
        taken: Tensor,
        started: Tensor,
        memory: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            features (`torch.Tensor` of shape `(B, T, D, h, w)`): `X_1 .. X_T`.
            previous (`torch.Tensor` of shape `(B, D, h, w)`): `X_0`.
            shares (`torch.Tensor` of shape `(B, T, n, h, w)`): What share of each cell `M_0 .. M_{T-1}` cover.
            slots (`torch.LongTensor` of shape `(B, n)`): The slot of each object.
            taken (`torch.BoolTensor` of shape `(B, T, n)`): Whether there is an object.
            started (`torch.BoolTensor` of shape `(B,)`): False where `X_0` is no frame.
            memory (`torch.FloatTensor` of shape `(B, 2, R + num_id_vectors + 1, R)`, *optional*): R is D + 1. The two
                averages over the frames before `X_0`: first `R` rows of products of looks over all pixels, then the
                looks of each slot's object and of the background.

        Returns:
            Logits of shape `(B, T, n, h, w)`, 0 for an object that has not been seen yet; whether it has, bool
            `(B, T, n)`; and the averages over the frames before `X_T`.
        """
        batch, frames = shares.shape[:2]
        size = shares.shape[-2:]
        looks = self.describe(features)
        seen = torch.cat([self.describe(previous).unsqueeze(1), looks[:, :-1]], dim=1)  # (B, T, S, R)
        shares = shares.float().flatten(3)
        shares = torch.cat([shares, (1 - shares.sum(dim=2, keepdim=True)).clamp(min=0)], dim=2)
        shares = torch.cat([shares[:, :1] * started.view(-1, 1, 1, 1), shares[:, 1:]], dim=1)
        holders = F.one_hot(F.pad(slots, (0, 1), value=self.num_slots), self.num_slots + 1).unsqueeze(1)
        holders = holders * F.pad(taken, (0, 1), value=True).unsqueeze(-1).float()  # (B, T, n + 1, num_slots + 1)

        evenly = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        means = holders.mT @ (evenly @ seen)  # (B, T, num_slots + 1, R); zeros where it is not to be seen
        width = looks.shape[-1]
        if memory is None:
            memory = looks.new_zeros(batch, 2, width + self.num_slots + 1, width)
        memories = []
        for t in range(frames):
            anyone = (memory[:, 1, width:-1, -1] > 0).any(dim=1)
            memory = memory * anyone.view(-1, 1, 1, 1)
            known = memory[:, 1, width:, -1:] > 0
            weights = [(~known).to(memory.dtype), torch.where(known, memory.new_full((), 1 - self.FADING[1]), 1.0)]
            averages = []
            for average, fading, weight in zip(memory.unbind(1), self.FADING, weights):
                of_pixels = evenly[:, t].mT @ (holders[:, t] @ weight)  # (B, S, 1)
                products = (of_pixels * seen[:, t]).mT @ seen[:, t]
                averages.append(fading * average + torch.cat([products, weight * means[:, t]], dim=1))
            memory = torch.stack(averages, dim=1)
            memories.append(memory)

        mean = torch.stack(memories, dim=1).mean(dim=2)
        targets = holders @ mean[:, :, width:]  # (B, T, n + 1, R)
        ridge = self.RIDGE * torch.eye(width, dtype=looks.dtype, device=looks.device)
        products = (mean[:, :, :width] + ridge).flatten(0, 1)
        classifiers = solve(products, targets.mT.flatten(0, 1), self.SOLVER_STEPS).unflatten(0, (batch, frames))
        scores = (looks @ classifiers).mT  # 1 is wanted in the object, 0 elsewhere
        best, second = F.pad(scores, (0, 0, 0, 1)).topk(2, dim=2).values.split(1, dim=2)
        logits = self.scale * (scores - torch.where(scores == best, second, best))
        known = targets[..., -1] > 0
        logits = (logits * known.unsqueeze(-1))[:, :, :-1].unflatten(-1, size)
        return logits, known[:, :, :-1], memory


def solve(matrices: Tensor, targets: Tensor, steps: int) -> Tensor:
    """
    Solves `matrices @ x = targets` for positive definite matrices (N, R, R) and columns (N, R, n): the inverse by
    Newton's iteration (of Schulz), which doubles its digits in each step, and the columns corrected once by what is
    left. All of it is products of matrices: few operations, that every runtime has, and none that waits for the host.
    """
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)  # no eigenvalue is larger
    inverse = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device) * (2 / trace).view(-1, 1, 1)
    for _ in range(steps):
        inverse = torch.baddbmm(inverse, inverse, matrices @ inverse, beta=2, alpha=-1)
    x = inverse @ targets
    return torch.baddbmm(x, inverse, torch.baddbmm(targets, matrices, x, alpha=-1))


class AusmHistoryEncoder(nn.Module):
    """
    From marked past frames to what they say about the present one: `E_t = X_{t-1} + marks`,
    `F_t = HistoryCompressor(E_t)`, `HistoryDecoder(query = X_t, key/value = F_t)`.

    The same code runs T frames at once (training) and one frame with a carried state (streaming).
    """

    def __init__(self, config: AusmConfig):
        super().__init__()
        self.key_stride = config.history_key_stride
        self.initial_features = nn.Parameter(torch.zeros(config.hidden_size))
        self.compressor = nn.ModuleList(AusmCompressorLayer(config) for _ in range(config.num_compressor_layers))
        self.memory_norm = nn.LayerNorm(config.hidden_size)
        self.mark_projection = self.local_read = self.mark_readout = None
        if config.history_local_kernel:
            size, kernel = config.hidden_size, config.history_local_kernel
            self.mark_projection = nn.Linear(size, size)
            self.local_read = nn.Conv2d(size, size, kernel, padding=kernel // 2, groups=size)
            self.mark_readout = AusmMarkReadout(config)
        self.mask_propagation = AusmMaskPropagation(config) if config.mask_propagation_radius else None
        self.appearance = AusmAppearance(config) if config.remember_appearance else None
        self.decoder = nn.ModuleList(AusmHistoryDecoderLayer(config) for _ in range(config.num_history_decoder_layers))
        self.output_norm = nn.LayerNorm(config.hidden_size)
        self.output_projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate = nn.Parameter(torch.full((config.hidden_size,), config.history_gate_init))

    def mark_vectors(self, id_vectors: Tensor) -> Tensor:
        """What ID vectors (..., D) are painted as."""
        return id_vectors if self.mark_projection is None else self.mark_projection(id_vectors)

    def read_marks(self, id_vectors: Tensor, change: Tensor) -> Tensor | None:
        """Logits (N, n, h, w) of ID vectors (N, n, D) in `change` (N, D, h, w); None without a read-out."""
        return None if self.mark_readout is None else self.mark_readout(id_vectors, change)

    def forward(
        self,
        features: Tensor,
        masks: Tensor,
        slots: Tensor,
        taken: Tensor,
        marks: Tensor,
        positions: Tensor,
        history: AusmHistory,
    ) -> tuple[Tensor, Tensor | None, tuple[tuple[Tensor, ...], ...], Tensor | None]:
        """
        Args:
            features (`torch.Tensor` of shape `(B * T, D, h, w)`): `X_1 .. X_T`.
            masks (`torch.Tensor` of shape `(B, T, n, height, width)`): `M_0 .. M_{T-1}`.
            slots (`torch.LongTensor` of shape `(B, n)`): The slot of each object.
            taken (`torch.BoolTensor` of shape `(B, T, n)`): Whether the object is followed in that frame.
            marks (`torch.Tensor` of shape `(B * T, D, h', w')`): Marks of `M_0 .. M_{T-1}`, on the map of stride
                `history_stride`.
            positions (`torch.Tensor` of shape `(h' w', D)`): Sine positions of that map.
            history (`AusmHistory`): Where the stream stands before the first of these frames.

        Returns:
            What the history adds to the features, `G - X`, of shape `(B * T, D, h', w')`; logits (B * T, n, h, w) of
            where objects are by where they were and what they look like, None without both parts; the new states, and
            the new memory of what objects look like.
        """
        batch, frames = masks.shape[:2]
        size = (features.shape[-2], features.shape[-1])
        # Frames are taken apart and together only with channels last: of maps in the other order that are single,
        # torch then loses track of how they lie in memory, and pools and resizes them ten times slower.
        present = channels_last(features).unflatten(0, (batch, frames))
        if history.features is None:
            first = self.initial_features.expand_as(present[:, 0])
        else:
            first = channels_last(history.features).to(features.dtype)
        past = channels_first(torch.cat([first.unsqueeze(1), present[:, :-1]], dim=1).flatten(0, 1))

        followed = remembered = appearance = None
        if self.mask_propagation is not None or self.appearance is not None:
            # `M_0` of a stream that begins is drawn on its first frame, not on `X_0`.
            started = (first[:, 0, 0] != self.initial_features).any(dim=1)
            masks = torch.cat([masks[:, :1] * started.view(-1, 1, 1, 1, 1), masks[:, 1:]], dim=1)
            shares = average_maps(masks.flatten(0, 1), size).to(features.dtype)
        if self.appearance is not None:
            with torch.autocast(features.device.type, enabled=False):
                followed, remembered, appearance = self.appearance(
                    features.unflatten(0, (batch, frames)),
                    past.unflatten(0, (batch, frames))[:, 0],
                    shares.unflatten(0, (batch, frames)),
                    slots,
                    taken,
                    started,
                    history.appearance,
                )
            followed = followed.flatten(0, 1).to(features.dtype)
        if self.mask_propagation is not None and masks.shape[2]:
            # An object that has been seen and has no mask now is away: it comes back where something looks like it.
            known = (masks > 0.5).flatten(3).any(dim=-1)
            known = known if remembered is None else known | remembered
            moved = self.mask_propagation(features, past, shares, known.flatten(0, 1))
            followed = moved if followed is None else followed + moved

        size = (marks.shape[-2], marks.shape[-1])
        queries, past, marks = (to_tokens(average_maps(x, size)) for x in (features, past, marks))
        memory = (past + marks).unflatten(0, (batch, frames))
        states = []
        for index, layer in enumerate(self.compressor):
            state = history.states[index] if history.states is not None else None
            memory, state = layer(memory, positions, size, state)
            states.append(state)

        values = self.memory_norm(memory).flatten(0, 1)
        hidden_states = queries
        if self.local_read is not None:
            hidden_states = hidden_states + to_tokens(self.local_read(to_maps(values, size)))
        keys = average_tokens(values + positions, size, self.key_stride)
        values = average_tokens(values, size, self.key_stride)
        for layer in self.decoder:
            hidden_states = layer(hidden_states, keys, values, positions, size)
        change = self.gate * self.output_projection(self.output_norm(hidden_states))
        return to_maps(change, size), followed, tuple(states), appearance
