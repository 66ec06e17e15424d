"""VFMTok's image generators as vLLM models."""


def register() -> None:
    """Register configurations and models with transformers and vLLM. It may be called several times."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vfmtok_vllm.configuration import VFMTokARConfig, VFMTokRARConfig

    for config_class in (VFMTokARConfig, VFMTokRARConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    # By name, because importing the models would initialize the device before vLLM's processes start.
    ModelRegistry.register_model("VFMTokARForImageGeneration", "vfmtok_vllm.ar:VFMTokARForImageGeneration")
    ModelRegistry.register_model("VFMTokRARForImageGeneration", "vfmtok_vllm.rar:VFMTokRARForImageGeneration")


__all__ = ["register"]
