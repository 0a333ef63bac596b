"""Load a text-to-image pipeline of ``diffusers``, from safetensors only, with actionable errors."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from synthgen.diffusion.memory import is_out_of_memory
from synthgen.errors import ConfigError, MissingDependency, MissingWeights, TooLittleMemory, UnknownName, one_line
from synthgen.untrusted import read_file, read_json

__all__ = ["DTYPES", "SHORT_NAMES", "DType", "Loading", "load_pipeline", "pipeline_class"]

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SHORT_NAMES: dict[str, str] = {  # short name → hub id
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-turbo": "stabilityai/sd-turbo",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
    "sd35-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
}

_INDEX = "model_index.json"
_LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}  # the last: where diffusers keeps the safety checker
_EDM, _SDE = "EDMEulerScheduler", "DPMSolverSDEScheduler"
_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}  # parts that no family needs to generate
_OPTIONAL = {"StableDiffusion3Pipeline": {*_UNUSED, "text_encoder_3", "tokenizer_3"}}  # by the class of the pipeline
_PICKLED = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class Loading:
    """What to load, and how to place it on a device.

    Args:
        model: a short name, a folder, or a hub id.
        dtype: type of the weights and of the computation.
        variant: variant of the weight files, such as "fp16".
        scheduler: a class of ``diffusers`` in place of the model's own, such as "DPMSolverMultistepScheduler".
        lora: a folder, file or hub id of LoRA weights.
        lora_scale: what their products are multiplied by.
        textual_inversion: a file or hub id of learned embeddings.
        without: parts not to load, such as Stable Diffusion 3's large text encoder.
        safety_checker: keep the model's own safety checker for flagging images.
        offload: keep only the part that computes on the device (slower, for large models on small GPUs).
        device: the device to run on.
    """

    model: str
    dtype: DType = "float32"
    variant: str = ""
    scheduler: str = ""
    lora: str = ""
    lora_scale: float = 1.0
    textual_inversion: str = ""
    without: tuple[str, ...] = ()
    safety_checker: bool = False
    offload: bool = False
    device: str = "cpu"


def load_pipeline(loading: Loading, known: Collection[str]) -> Any:
    """A pipeline whose class is one of ``known``, on its device.

    The safety checker is removed, so that no image is blacked out; if requested, it remains as the pipeline's
    ``kept_safety_checker``. No image gets the invisible watermark that Stable Diffusion XL's pipeline adds if the
    library for it is installed.

    Raises:
        MissingWeights: the weights are not on this machine and cannot be downloaded.
        UnknownName: the model is neither a folder, a hub id, nor a short name.
        ConfigError: the model is of another family, or its scheduler cannot be used.
        MissingDependency: LoRA weights need a library that is not installed.
        TooLittleMemory: the device cannot hold the model.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # before diffusers imports more of it and it starts to log
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    for library in (logging, transformers_logging):  # their progress bars would interleave with ours
        library.disable_progress_bar()
    model = SHORT_NAMES.get(loading.model, loading.model)
    kind = pipeline_class(model)
    if kind not in known:
        raise ConfigError(f"{model!r} is a {kind}, whose attention synthgen does not know; known: {', '.join(known)}")
    options: dict[str, Any] = {"dtype": DTYPES[loading.dtype], "use_safetensors": True}
    if loading.variant:
        options["variant"] = loading.variant
    index = _index(model)
    _check_without(model, index, loading.without)
    _refuse_code(model, index)
    _refuse_pickled(loading)
    empty = set(_parts(index)) - set(_parts(index, saved=True))
    options |= dict.fromkeys([*sorted(empty), *loading.without])
    if loading.safety_checker and "safety_checker" not in _parts(index, saved=True):
        raise ConfigError(f"{model!r} has no safety checker to ask; leave safety_checker false")
    if kind == "StableDiffusionXLPipeline":
        options["add_watermarker"] = False
    if "safety_checker" in index:
        options["requires_safety_checker"] = False
        if not loading.safety_checker:
            options["safety_checker"] = None
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(model, **options)
    except (OSError, ValueError, SafetensorError, AttributeError, ImportError, TypeError) as error:
        raise _missing(model, error) from None
    _add_parts(pipeline, loading)
    pipeline.set_progress_bar_config(disable=True)
    try:
        return _placed(pipeline, loading)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(model, loading) from None


def _check_without(model: str, index: dict[str, Any], without: tuple[str, ...]) -> None:
    """Check that a model has the parts to leave out, and works without them.

    Raises:
        ConfigError: the model has no such part, or needs it.
    """
    optional = [part for part in _parts(index) if part in _OPTIONAL.get(str(index.get("_class_name")), _UNUSED)]
    for part in without:
        if part not in index:
            raise ConfigError(f"{model!r} has no part {part!r} to leave out; there are: {', '.join(_parts(index))}")
        if part not in optional:
            raise ConfigError(
                f"{model!r} needs its part {part!r}; what it can do without: {', '.join(optional) or 'nothing'}"
            )
    if "tokenizer_3" in without and "text_encoder_3" not in without:
        raise ConfigError("without tokenizer_3 its text_encoder_3 cannot be used; leave out both")


def _placed(pipeline: Any, loading: Loading) -> Any:
    """The pipeline on its device, and the safety checker beside it."""
    if loading.safety_checker:
        pipeline.kept_safety_checker = pipeline.safety_checker.to(loading.device)
        pipeline.safety_checker = None
    if loading.offload and loading.device != "cpu":
        pipeline.enable_model_cpu_offload(device=loading.device)
        return pipeline
    return pipeline.to(loading.device)


def _too_large(model: str, loading: Loading) -> TooLittleMemory:
    """The error for a model that the device cannot hold, with the settings that would help."""
    helps = {
        "dtype float16 or bfloat16": loading.dtype == "float32",
        "offload: true": not loading.offload,
        "safety_checker: false": loading.safety_checker,
    }
    ways = ", ".join(way for way, helpful in helps.items() if helpful)
    return TooLittleMemory(
        f"{loading.device} has too little memory to load {model!r} in {loading.dtype}; see what else is on it, or take "
        f"a smaller model{'; or try ' + ways if ways else ''}"
    )


def pipeline_class(model: str) -> str:
    """The name of the class that the ``model_index.json`` of a short name, folder or hub id asks for.

    Raises:
        MissingWeights, UnknownName: there is no such file, here or on the hub.
    """
    return str(_index(SHORT_NAMES.get(model, model)).get("_class_name", "model without a class"))


def _index(model: str) -> dict[str, Any]:
    if "/" not in model and not Path(model).exists():  # neither a hub id nor a folder: no need to ask the hub
        raise UnknownName(f"{UnknownName.among('model', model, SHORT_NAMES)}; a folder or a hub id will do too")
    try:
        index = read_json(read_file(_index_path(model)))
    except (OSError, ValueError) as error:
        raise _missing(model, error) from None
    if not isinstance(index, dict):
        raise _missing(model, ValueError("its model_index.json is not an object"))
    return dict(index)


def _index_path(model: str) -> Path:
    """The index of a model: in its folder, in the hub's cache, or else downloaded."""
    from huggingface_hub import hf_hub_download

    if Path(model).exists():
        return Path(model) / _INDEX
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry; the error comes in one line
    try:
        return Path(hf_hub_download(model, _INDEX, local_files_only=True))
    except OSError:  # not in the cache
        return Path(hf_hub_download(model, _INDEX))


def _refuse_code(model: str, index: dict[str, Any]) -> None:
    """Check that a model contains no code: its parts must be classes of diffusers and transformers.

    Raises:
        ConfigError: the model would run its own code or import another library; no flag allows it.
    """
    for name in _parts(index, saved=True):
        library = index[name][0]
        if library not in _LIBRARIES or (Path(model) / name / f"{library}.py").exists():
            raise ConfigError(
                f"{model!r} wants to run code of {str(library)[:80]!r} for its part {name!r}; synthgen runs no code "
                "that comes with a model, only classes of diffusers and transformers"
            )


def _refuse_pickled(loading: Loading) -> None:
    """Check that added weights are safetensors: other formats may run code when they are loaded.

    Raises:
        ConfigError: the weights are in another format.
    """
    for setting, extra in (("lora", loading.lora), ("textual_inversion", loading.textual_inversion)):
        path = Path(extra)
        if extra and ((path.is_file() or path.suffix in _PICKLED) and path.suffix != ".safetensors"):
            raise ConfigError(
                f"{setting}: {extra!r} is no safetensors file, and other weights may run code when they are read; "
                "convert it, for example with safetensors.torch.save_file"
            )


def _parts(index: dict[str, Any], *, saved: bool = False) -> list[str]:
    """The parts named in an index, or only those saved with the model."""
    parts = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    return [name for name, value in parts.items() if any(value) or not saved]


def _missing(model: str, error: Exception) -> MissingWeights:
    path, why = Path(model), one_line(error)
    if path.is_file():
        return MissingWeights(
            f"{model!r} is one file, and a folder in the layout of diffusers is needed; convert it, for example with "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if path.is_dir() and not (path / _INDEX).exists():
        return MissingWeights(
            f"the folder {model!r} has no {_INDEX}; give the folder of a diffusers pipeline, which has"
        )
    if path.exists():
        return MissingWeights(
            f"the folder {model!r} cannot be loaded as a pipeline of diffusers: {why}; check that it is whole, and has "
            "safetensors weights"
        )
    return MissingWeights(
        f"the model id {model!r} cannot be loaded as a pipeline of diffusers: {why}; download it first, for example "
        f"with: hf download {model}, and check that it has safetensors weights"
    )


def _set_scheduler(pipeline: Any, name: str) -> None:
    """Set the scheduler of this name, or check that the pipeline's own is supported.

    Two that diffusers lists as compatible are not: EDMEulerScheduler scales noise differently from these models, and
    DPMSolverSDEScheduler draws noise independent of the images' seeds. So do stochastic schedulers for flow matching,
    because the pipelines of Stable Diffusion 3 and FLUX pass them no generator.

    Raises:
        ConfigError: the scheduler cannot be used with this model.
    """
    import diffusers

    own = pipeline.scheduler
    if type(own).__name__ == "FlowMatchLCMScheduler" or own.config.get("stochastic_sampling"):
        raise ConfigError(
            f"this model's {type(own).__name__} draws noise that does not depend on the images' seeds; save the model "
            "with a FlowMatchEulerDiscreteScheduler whose stochastic_sampling is false"
        )
    if not name and type(own).__name__ == _SDE:
        raise ConfigError(f"this model's {_SDE} draws noise of its own; set scheduler: EulerAncestralDiscreteScheduler")
    if not name:
        return
    compatible = {part.__name__: part for part in own.compatibles if part.__name__ != _EDM}
    compatible[type(own).__name__] = type(own)
    compatible.pop(_SDE, None)
    if name not in compatible or not hasattr(diffusers, name):
        raise UnknownName.among("scheduler for this model", name, compatible)
    try:
        pipeline.scheduler = compatible[name].from_config(own.config)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"this model cannot be used with the scheduler {name}: {one_line(error)}") from None


def _add_parts(pipeline: Any, loading: Loading) -> None:
    """Add a scheduler, LoRA weights and learned embeddings to a model."""
    _set_scheduler(pipeline, loading.scheduler)
    extra = loading.lora or loading.textual_inversion
    try:
        if loading.lora:
            pipeline.load_lora_weights(loading.lora, use_safetensors=True, adapter_name="lora")
            if not pipeline.get_list_adapters():  # diffusers only warns if no key matches a part of this model
                raise ConfigError(
                    f"{loading.lora!r} has no LoRA weights for {loading.model!r}; take some that were trained for it"
                )
            pipeline.set_adapters("lora", loading.lora_scale)
            extra = loading.textual_inversion
        if loading.textual_inversion:
            _add_embeddings(pipeline, loading.textual_inversion)
    except (OSError, KeyError, SafetensorError) as error:
        raise MissingWeights(f"{extra!r} cannot be loaded: {one_line(error)[:200]}") from None
    except (ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        if "PEFT" in str(error):
            raise MissingDependency("LoRA weights need the library 'peft'; install it with: pip install peft") from None
        raise ConfigError(
            f"{loading.model!r} cannot use the weights {extra!r}: {one_line(error)[:300]}; take some that were "
            "trained for this model"
        ) from None


def _add_embeddings(pipeline: Any, source: str) -> None:
    """Load learned embeddings from a file or hub id.

    Stable Diffusion XL's have two tensors, ``clip_l`` and ``clip_g``, one for each text encoder. They name no token; it
    is the last part of ``source``, without extension.
    """
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    (state,) = load_textual_inversion_state_dicts([source], use_safetensors=True)
    if not {"clip_l", "clip_g"} <= state.keys():
        pipeline.load_textual_inversion(state)
        return
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
        tokenizer, encoder = (getattr(pipeline, f"{part}{number}") for part in ("tokenizer", "text_encoder"))
        pipeline.load_textual_inversion(state[name], token=Path(source).stem, tokenizer=tokenizer, text_encoder=encoder)
