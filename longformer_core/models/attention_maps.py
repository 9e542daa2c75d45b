"""What a model's encoder attends to in one document, for plots."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longformer_core.attention.dense import dense_probabilities
from longformer_core.errors import ConfigError, ShapeError
from longformer_core.layout import Layout
from longformer_core.models.led import LEDPreTrainedModel
from longformer_core.models.longformer import LongformerPreTrainedModel
from longformer_core.models.self_attention import LongformerSelfAttention


@torch.no_grad()
def attention_dense(
    model: LEDPreTrainedModel | LongformerPreTrainedModel,
    input_ids: Tensor,
    layer: int,
    *,
    global_positions: Sequence[int] = (),
) -> Tensor:
    """Return the attention probabilities of one encoder layer for one document.

    Row i says where token i looks; see `dense_probabilities`. Dropout acts as the model stands:
    call `eval()` on a model in training. No token is global unless named.
    Shapes: input_ids [N]; returns [H, N, N] in float32 (float64 of a float64 model).
    Units: `layer` counts from 0.
    Raises: ConfigError for a layer that the encoder does not have; ShapeError for ids that are not
        one document, and for positions outside it.
    """
    if input_ids.dim() != 1:
        raise ShapeError(f"input_ids have shape {list(input_ids.shape)}; give one document, [N]")
    layers = [module for module in model.modules() if isinstance(module, LongformerSelfAttention)]
    if not 0 <= layer < len(layers):
        raise ConfigError(f"there is no layer {layer}; the encoder has 0 to {len(layers) - 1}")
    attention = layers[layer]
    layout = Layout.from_lengths([len(input_ids)], [global_positions], device=input_ids.device)
    states = _layer_input(model, attention, input_ids, layout)
    chosen = states[layout.global_index]

    def heads(module: nn.Module, of: Tensor) -> Tensor:
        out: Tensor = module(of).unflatten(-1, (attention.num_heads, -1))
        return out

    return dense_probabilities(
        heads(attention.query, states),
        heads(attention.key, states),
        layout,
        attention.radius,
        q_global=heads(attention.query_global, chosen),
        k_global=heads(attention.key_global, states),
    )


def _layer_input(
    model: LEDPreTrainedModel | LongformerPreTrainedModel,
    attention: nn.Module,
    input_ids: Tensor,
    layout: Layout,
) -> Tensor:
    """Run the encoder and return the states [N, d] that one of its attentions was given."""
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        marks = torch.zeros_like(input_ids)
        marks[layout.global_index] = 1
        encode = model.base.encode_padded if isinstance(model, LEDPreTrainedModel) else model.base
        encode(input_ids[None], global_attention_mask=marks[None])
    finally:
        hook.remove()
    return seen[0]
