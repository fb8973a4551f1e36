"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): move outlier channels from a layer's input into its weight.

    x W^T = (x / s) (W s)^T,   s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

The division is folded into the module that computes x: the norm in front of q, k, v and of gate, up; v_proj in front of
o_proj (attention mixes tokens, not channels); up_proj in front of down_proj. In exact arithmetic the model remains the
same function. Query heads that share a value head share its s.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.ptq.method import LayerByLayer
from qat.ptq.stream import Stream, Weights, fill
from qat.quant.architecture import Smoothed, decoder_layers, head_dim
from qat.quant.config import QuantConfig
from qat.quant.quantizers.base import Grid
from qat.quant.rotated import smoothed
from qat.runtime.errors import UserError
from qat.store.model_folder import ModelFolder

ALPHAS = (0.1, 0.3, 0.5, 0.7)
"""The alphas that the search tries, in addition to no smoothing."""

SEARCH_TOKENS = 1024
"""Number of calibration tokens that the search uses: all alphas are compared on the same tokens, and a layer runs over
them 17 times rounded and once not."""


@dataclass(frozen=True)
class SmoothQuantConfig:
    """The settings of SmoothQuant.

    Args:
        alpha: migration strength: 1 evens out the inputs, 0 the weights. By default searched for each smoothed tensor
            of each decoder layer, no smoothing included, to minimize the error of the layer's output on the
            calibration text
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"alpha={self.alpha} is invalid: choose 0 to 1, or nothing to have it searched for.")


Alphas = Mapping[Smoothed, float]
"""The alpha of each smoothed tensor."""


class SmoothQuant(LayerByLayer):
    meaning = "moves outlier channels from inputs into weights, then rounds to nearest (arXiv 2211.10438)"
    config = SmoothQuantConfig

    @classmethod
    def check(cls, quant: QuantConfig) -> None:
        if quant.measures_scales:
            raise UserError(
                f"{quant.measured_setting} has scales that are measured before method=smoothquant changes the "
                "activations: give another format, or method=rtn or gptq."
            )

    def __init__(self, source: Path, settings: SmoothQuantConfig):
        super().__init__(source, settings)
        model = ModelFolder.read(source).skeleton()
        self._layers, self._head_dim = decoder_layers(model), head_dim(model.config)
        self._groups = smoothed(model.config)
        if not self._groups:
            raise UserError(
                f"The Architecture of {model.config.model_type} describes no inputs that method=smoothquant can scale: "
                "give method=rtn or method=gptq."
            )

    @torch.inference_mode()
    def quantize_layer(self, stream: Stream, weights: Weights) -> tuple[Weights, dict[str, Grid], str]:
        """Return the weights of the layer at the stream's position with the scales folded in, not rounded yet; no
        grids, as the weights' own largest values give them; and a note on the alphas."""
        plain = self._layers[stream.position]
        fill(plain, weights, stream.device)
        plain.to(stream.dtype)
        largest = {group: largest_by_channel(stream, plain, group) for group in self._groups}
        alphas: dict[Smoothed, float] = {}
        if self.settings.alpha is not None:
            alphas = dict.fromkeys(self._groups, self.settings.alpha)
        else:
            sample = first_tokens(stream.hidden, SEARCH_TOKENS)
            wanted = [stream.run(plain, hidden) for hidden in sample]

            def error(tried: Alphas) -> float:
                return output_error(stream, fold(weights, largest, tried, self._head_dim), sample, wanted)

            alphas = search(self._groups, error)
        plain.to("meta")
        word = "alpha " + " ".join(f"{alphas[group]:g}" if group in alphas else "-" for group in self._groups)
        return fold(weights, largest, alphas, self._head_dim), {}, word


def search(groups: Iterable[Smoothed], error: Callable[[Alphas], float]) -> dict[Smoothed, float]:
    """Find, for one tensor after another, the alpha with the smallest ``error``; tensors that smoothing does not help
    get none."""
    chosen: dict[Smoothed, float] = {}
    least = error(chosen)
    for group in groups:
        errors = {alpha: error(chosen | {group: alpha}) for alpha in ALPHAS}
        best = min(errors, key=errors.__getitem__)
        if errors[best] < least:
            chosen[group], least = best, errors[best]
    return chosen


def fold(weights: Weights, largest: Mapping[Smoothed, Tensor], alphas: Alphas, head_dim: int) -> Weights:
    """Return a decoder layer's weights, smoothed with the given alphas; ``largest`` is max|x_j| of each tensor's
    channels, [read].

    Computed in fp32, whatever the dtype of the weights.
    """
    folded = {name: weight.float() for name, weight in weights.items()}
    for group, alpha in alphas.items():
        columns = torch.stack([weights[f"{name}.weight"].float().abs().amax(0) for name in group.readers]).amax(0)
        produced = len(weights[f"{group.producer}.weight"])
        s = smoothing_scale(
            shared_maximum(largest[group], produced, head_dim), shared_maximum(columns, produced, head_dim), alpha
        )
        for kind in ("weight", "bias"):
            if (name := f"{group.producer}.{kind}") in folded:
                folded[name] = (folded[name].t() / s).t()  # over the output channels of a norm or a matrix
        for name in group.readers:
            folded[f"{name}.weight"] = folded[f"{name}.weight"] * spread(s, len(columns), head_dim)
    return {name: weight.to(weights[name].dtype).contiguous() for name, weight in folded.items()}


def smoothing_scale(inputs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Compute s [produced] from the largest magnitudes of input channels and weight columns, both [produced]; 1 where
    one of them is 0.

    Its geometric mean is 1: a common factor would change nothing that is rounded, only the weights' range.
    """
    log = alpha * inputs.log() - (1 - alpha) * columns.log()
    usable = log.isfinite()
    return torch.where(usable, log - log[usable].mean(), 0.0).exp()


def shared_maximum(channels: Tensor, produced: int, head_dim: int) -> Tensor:
    """Reduce [read] to [produced] by the maximum over the channels that come from the same one: those of the query
    heads of a value head. If nothing is shared, return the input."""
    return channels.view(produced // head_dim, -1, head_dim).amax(1).flatten() if len(channels) > produced else channels


def spread(s: Tensor, read: int, head_dim: int) -> Tensor:
    """Expand [produced] to [read]: each channel's scale, at all the places where it is read."""
    if read == len(s):
        return s
    return s.view(-1, 1, head_dim).expand(-1, read // len(s), -1).flatten()


def largest_by_channel(stream: Stream, layer: nn.Module, group: Smoothed) -> Tensor:
    """Compute max|x_j| over the calibration tokens of the group's shared input, fp32 [in], on the CPU."""
    reader = layer.get_submodule(group.readers[0])
    return torch.stack([x.abs().amax(0) for x in stream.inputs(layer, reader)]).amax(0).float().cpu()


def first_tokens(hidden: list[Tensor], most: int) -> list[Tensor]:
    """Return the first complete sequences [1, tokens, hidden] that together have ``most`` tokens or slightly more."""
    taken, tokens = [], 0
    for x in hidden:
        if tokens >= most:
            break
        taken.append(x)
        tokens += x.shape[1]
    return taken


def output_error(stream: Stream, weights: Weights, hidden: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Compute the squared error of the quantized layer's output on each ``hidden`` [1, tokens, hidden], which should be
    ``wanted`` [1, tokens, hidden]; relative to each token's size, because the next norm scales all tokens to the same
    size. Return the mean over the tokens."""
    layer = stream.load_rounded(weights, {})
    errors = []
    for x, y in zip(hidden, wanted, strict=True):
        difference = stream.run(layer, x).float() - y.float()
        errors.append((difference.square().sum(-1) / y.float().square().sum(-1)).flatten())
    stream.unload()
    return torch.cat(errors).mean().item()
