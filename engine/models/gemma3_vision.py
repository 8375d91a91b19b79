"""Gemma 3 checkpoints whose model sees images, too: the text model in them, which is Gemma 3's.

Requests are text, of which the image encoder sees nothing: its tensors are not read.
"""

from dataclasses import replace

from engine.models import gemma3
from engine.weights.tensor_names import TensorNames

FAMILY = replace(
    gemma3.FAMILY,
    architecture="Gemma3ForConditionalGeneration",
    text_group="text_config",
    # Files say what differs from these.
    defaults={**gemma3.FAMILY.defaults, "vocab_size": 262208, "num_attention_heads": 8},
    names=TensorNames(
        top={
            "model.embed_tokens": "language_model.model.embed_tokens",
            "model.norm": "language_model.model.norm",
            "lm_head": "language_model.lm_head",
        },
        layers="language_model.model.layers",
        layer=gemma3.FAMILY.names.layer,
        not_read=("vision_tower.", "multi_modal_projector."),
    ),
)
