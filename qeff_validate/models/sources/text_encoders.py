# SPDX-License-Identifier: Apache-2.0
"""The body that turns texts into hidden states: AutoModel's class, or the text encoder of a model with more parts.

An encoder-decoder has an encoder, a model of images and texts has a text tower; sentence-transformers uses the same
classes for embeddings. Importing this module loads no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENCODERS: Mapping[str, str] = {
    "blenderbot": "models.blenderbot.modeling_blenderbot.BlenderbotEncoder",
    "blenderbot-small": "models.blenderbot_small.modeling_blenderbot_small.BlenderbotSmallEncoder",
    "longt5": "LongT5EncoderModel",
    "m2m_100": "models.m2m_100.modeling_m2m_100.M2M100Encoder",
    "marian": "models.marian.modeling_marian.MarianEncoder",
    "mt5": "MT5EncoderModel",
    "pegasus": "models.pegasus.modeling_pegasus.PegasusEncoder",
    "pegasus_x": "models.pegasus_x.modeling_pegasus_x.PegasusXEncoder",
    "prophetnet": "ProphetNetEncoder",
    "siglip2_text_model": "Siglip2TextModel",
    "siglip_text_model": "SiglipTextModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
    "t5": "T5EncoderModel",
    "t5gemma": "T5GemmaEncoderModel",
    "udop": "UdopEncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""Encoders that AutoModel does not build, or builds with their decoders, by model type; sentence-transformers takes the
same."""

TOWERS: Mapping[str, str] = {
    "clip": "CLIPTextModel",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
}
"""Text towers of models of images and texts, by model type; their config is the part ``text_config``."""


class TextEncoder:
    """Stands in for AutoModel: loads or builds the body of a config."""

    @staticmethod
    def from_config(config: Any, **options: Any) -> Any:
        """Build the body with weights that transformers initializes; options as those of AutoModel."""
        from transformers import AutoModel

        encoder = _encoder_class(config)
        if encoder is None:
            return AutoModel.from_config(config, **options)
        return encoder._from_config(_own_config(config), dtype=options.get("dtype"))

    @staticmethod
    def from_pretrained(folder: Any, *, config: Any, **options: Any) -> Any:
        """Load the body from a directory; options as those of AutoModel."""
        from transformers import AutoModel

        encoder = _encoder_class(config)
        if encoder is None:
            return AutoModel.from_pretrained(folder, config=config, **options)
        options.pop("trust_remote_code", None)
        return encoder.from_pretrained(folder, config=_own_config(config), **options)


def builds_body(config: Any) -> bool:
    """Return True if `TextEncoder` builds a body of a config."""
    from transformers import MODEL_MAPPING

    return _encoder_class(config) is not None or type(config) in MODEL_MAPPING


def _encoder_class(config: Any) -> Any:
    from importlib import import_module

    module, _, name = {**ENCODERS, **TOWERS}.get(config.model_type, "").rpartition(".")
    return getattr(import_module(f"transformers.{module}" if module else "transformers"), name) if name else None


def _own_config(config: Any) -> Any:
    """Return the config of the encoder alone."""
    if config.model_type == "t5gemma":
        config.is_encoder_decoder = False
    return config.text_config if config.model_type in TOWERS else config
