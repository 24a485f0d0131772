"""The model type `laconic` of transformers, for models whose blocks differ in width (`structure.widths`)."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig

from laconic.structure.config_keys import BASE, MODEL_TYPE, WIDTHS


class LaconicModelConfig(PretrainedConfig):
    """Configuration class that transformers looks up for our model type; it reads the config of a stock kind."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config of the stock model's kind with widths by block.

        Args:
            config_dict: Contents of config.json.
            **kwargs: Arguments of the stock config's `from_dict`.

        Returns:
            What the stock config's `from_dict` returns: the config, and unused arguments if they are asked for.

        Raises:
            ValueError: The keys name no stock model type that transformers knows, or no widths.
        """
        # Imported here: this module is loaded while `transformers` is still half loaded.
        from laconic.structure.widths import CONFIG_MAPPING_NAMES, config_class

        base = config_dict.get(BASE)
        if base not in CONFIG_MAPPING_NAMES or not isinstance(config_dict.get(WIDTHS), list):
            raise ValueError(
                f"config.json has model_type '{MODEL_TYPE}', but not the keys {BASE} and {WIDTHS}; copy the model again"
            )
        return config_class(base).from_dict(config_dict, **kwargs)


def register() -> None:
    """Make the model type known to transformers."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, LaconicModelConfig, exist_ok=True)
