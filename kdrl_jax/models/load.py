"""From a `ModelConfig` to what is there: the decoder's config now, its parameters when asked for."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from kdrl_jax.config import ArchitectureConfig, ModelConfig
from kdrl_jax.models import tensors
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.families import Family, family_named
from kdrl_jax.models.gguf import GGUFFile
from kdrl_jax.models.hf import SafetensorsFolder, read_config
from kdrl_jax.models.tensors import Row, TensorFile
from kdrl_jax.paths import as_path, is_remote
from kdrl_jax.types import Params

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, configs and whatever tokenizers are made of; nothing from subfolders.
_HUB_FILES = ["*.json", "model*.safetensors", "*.model", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt"]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that has been found, and checked as far as that goes without reading its weights."""

    config: DecoderConfig
    """After `keep_layers`."""
    family: Family
    tokenizer_path: str | None
    """The folder or .gguf file whose tokenizer belongs to the model; None for random weights."""
    _load: Callable[[Params], Params] | None

    @property
    def has_weights(self) -> bool:
        """False for random weights, which `models.decoder.Model.init` makes."""
        return self._load is not None

    def load(self, abstract: Params) -> Params:
        """Reads the parameters, one tensor at a time, straight into their place on the devices.

        Args:
            abstract: shape, type and sharding (None: the default device) of each leaf; int8 leaves are
                quantised as they arrive. Leaves that a file cannot have (adapters) are left out.

        Raises:
            ValueError: naming every tensor that is not finite.
        """
        assert self._load is not None, "a model with `architecture` has no weights to load"
        return self._load(abstract)


def open_model(config: ModelConfig, vocab_size: int | None = None) -> ModelSource:
    """Finds the model that a config names; reads headers, not weights.

    Args:
        vocab_size: of a model with random weights: its tokenizer's size. A model from files brings
            its own and ignores it.

    Raises:
        ValueError: in one line: what was given, what is wrong with it, and what to do.
    """
    if config.run is not None:
        raise ValueError(f"run={config.run!r} holds a trained checkpoint, not model files; give path instead")
    if config.architecture is not None:
        if vocab_size is None:
            raise ValueError("architecture is given without the size of a vocabulary; give a tokenizer")
        return _from_architecture(config.architecture, vocab_size)
    assert config.path is not None
    if is_remote(config.path):
        raise ValueError(
            f"path={config.path!r} is in a bucket, and weights are read from disks: copy them to each host "
            "(on a TPU slice tpu/setup.sh --prepare does) and give that folder"
        )
    path = as_path(config.path)
    if not path.exists() and _HUB_NAME.fullmatch(config.path) and path.suffix != ".gguf":
        path = _download(config.path)
    elif not path.exists():
        raise ValueError(
            f"path={config.path!r} does not exist; give a model folder, a .gguf file or a hub name"
        )
    if config.sha256 is not None:
        _check_sha256(path, config.sha256)
    if path.is_dir():
        return _from_folder(path, config)
    if path.suffix != ".gguf":
        raise ValueError(f"path={config.path!r} is a file, but not .gguf; give the folder it is in")
    return _from_gguf(path, config)


def _from_architecture(architecture: ArchitectureConfig, vocab_size: int) -> ModelSource:
    family = family_named(architecture.family)
    # Its field names are config.json's. A family's own default of head_dim is that of its published models.
    fields = architecture.model_dump(exclude={"family"}) | {
        "head_dim": architecture.head_dim or architecture.hidden_size // architecture.num_attention_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": DecoderConfig.max_positions,
    }
    return ModelSource(family.config_from_hf(fields), family, None, None)


def _from_folder(folder: Path, config: ModelConfig) -> ModelSource:
    if not (folder / "config.json").exists() and any(folder.glob("*.gguf")):
        found = sorted(path.name for path in folder.glob("*.gguf"))
        raise ValueError(f"path={config.path!r} is a folder of GGUF files; give one: {', '.join(found)}")
    family, whole = read_config(folder)
    return _source(family, family.tensors, whole, SafetensorsFolder(folder), config)


def _from_gguf(path: Path, config: ModelConfig) -> ModelSource:
    file = GGUFFile(path)
    family, whole = file.config()
    return _source(family, family.gguf_tensors, whole, file, config)


def _source(
    family: Family, table: tuple[Row, ...], whole: DecoderConfig, file: TensorFile, config: ModelConfig
) -> ModelSource:
    """Checks names and shapes now, so that a wrong file is reported before anything is compiled."""
    found = tensors.problems(table, whole, file)
    if found:
        raise ValueError(
            f"{file.where}: {'; '.join(found)}. These weights do not fit their config: "
            "get both from one place, or another model"
        )
    layers = config.layer_indices() or tuple(range(whole.num_layers))
    if layers[-1] >= whole.num_layers:
        raise ValueError(
            f"keep_layers names layer {layers[-1]}, but {file.where} has layers 0-{whole.num_layers - 1}"
        )

    def load(abstract: Params) -> Params:
        return tensors.load(table, whole, file, layers, abstract)

    return ModelSource(whole.keep(layers), family, file.where, load)


def _check_sha256(path: Path, expected: str) -> None:
    if path.is_dir():
        raise ValueError(f"sha256 checks one file, and {path} is a folder; remove sha256")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise ValueError(f"{path} has sha256 {found}, not {expected}; get the file again")


def _download(name: str) -> Path:
    import huggingface_hub

    reason = ""
    try:
        # Asked once: a download asks six times in half a minute, and the name may be a mistyped path.
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # The client raises its own, its HTTP library's and the system's errors.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    cached = bool(reason)  # What was fetched before may be all there.
    try:
        # A model that is not supported is refused by its config, before its weights are fetched.
        config = Path(huggingface_hub.hf_hub_download(name, "config.json", local_files_only=cached))
    except Exception:  # No config: said below, or a folder of GGUF files.
        config = None
    if config is not None:
        read_config(config.parent)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"], local_files_only=cached
            )
        )
    except Exception as error:
        raise ValueError(
            f"path={name!r} is not a local path and could not be fetched from the hub "
            f"({reason or ' '.join(str(error).split())[:200]}); give `path: FOLDER` with the model's files"
        ) from error
