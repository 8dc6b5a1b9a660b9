"""SAELens dictionaries of every kind, made and read by SAELens: `make_saelens.py FOLDER`.

Also a Gemma Scope npz, as SAELens' own loader reads it.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import sae_lens
import torch
from expected import D_MODEL, D_SAE, K, randomise, write
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import SAEMetadata

SAE_AT = {"model_name": "tiny", "hook_name": "blocks.3.hook_resid_post"}
TRANSCODER_AT = {
    "model_name": "tiny",
    "hook_name": "blocks.2.mlp.hook_in",
    "hook_name_out": "blocks.2.hook_mlp_out",
}
SIZES: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE}


def sae(architecture: str, **settings: Any) -> sae_lens.SAE:
    """A dictionary with random weights."""
    cls, config = sae_lens.saes.sae.get_sae_class(architecture)
    return _filled(cls(config(**SIZES, metadata=SAEMetadata(**SAE_AT), **settings)))


def transcoder(architecture: str, **place: str) -> sae_lens.SAE:
    """A transcoder with random weights."""
    cls, config = sae_lens.saes.sae.get_sae_class(architecture)
    settings = {"apply_b_dec_to_input": False, "d_out": D_MODEL}
    metadata = SAEMetadata(**{**TRANSCODER_AT, **place})
    return _filled(cls(config(**SIZES, metadata=metadata, **settings)))


def training(cls: type, config: type, **settings: Any) -> sae_lens.TrainingSAE:
    """A dictionary as it is in training: saved by ``save_inference_model``."""
    made = _filled(cls(config(**SIZES, k=K, metadata=SAEMetadata(**SAE_AT), **settings)))
    made.topk_threshold.fill_(0.7)
    return made


def _filled(made: sae_lens.SAE) -> sae_lens.SAE:
    randomise(dict(made.named_parameters()), seed=len(made.cfg.architecture()))
    return made


def keep(folder: Path, case: str, made: sae_lens.SAE) -> None:
    """Save it, and write what SAELens makes of the saved file."""
    if isinstance(made, sae_lens.TrainingSAE):
        made.save_inference_model(folder / case)
    else:
        made.save_model(folder / case)
    tell(folder, case)


def tell(folder: Path, case: str) -> None:
    """Load a dictionary with SAELens, in float32, and write its activations."""
    loaded = sae_lens.SAE.load_from_disk(folder / case, dtype="float32")
    write(folder, case, loaded.encode, loaded.decode)


def mapped(folder: Path) -> None:
    """What can be read a few columns at a time, or whole (topk)."""
    for name, subtracts in (("", True), ("_no_b_dec", False)):
        for architecture in ("standard", "jumprelu", "gated"):
            keep(folder, architecture + name, sae(architecture, apply_b_dec_to_input=subtracts))
        keep(folder, "topk" + name, sae("topk", k=K, apply_b_dec_to_input=subtracts))
    keep(folder, "topk_rescaled", sae("topk", k=K, rescale_acts_by_decoder_norm=True))
    keep(folder, "batchtopk", training(
        sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig,
        rescale_acts_by_decoder_norm=False))  # fmt: skip
    keep(folder, "batchtopk_rescaled", training(
        sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig))  # fmt: skip
    keep(folder, "matryoshka", training(
        sae_lens.MatryoshkaBatchTopKTrainingSAE, sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
        matryoshka_widths=[64]))  # fmt: skip
    keep(folder, "jumprelu_bfloat16", sae("jumprelu").to(torch.bfloat16))
    for architecture in ("transcoder", "skip_transcoder", "jumprelu_transcoder",
                         "jumprelu_skip_transcoder"):  # fmt: skip
        keep(folder, architecture, transcoder(architecture))
    keep(folder, "transcoder_resid_mid",
         transcoder("transcoder", hook_name="blocks.2.hook_resid_mid"))  # fmt: skip


def old(folder: Path) -> None:
    """Folders as SAELens wrote them before 6.0: one flat config."""
    flat = {
        "architecture": "standard", "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32",
        "device": "cpu", "model_name": "tiny", "hook_name": "blocks.3.hook_resid_pre",
        "hook_layer": 3, "hook_head_index": None, "prepend_bos": True, "context_size": 128,
        "dataset_path": "none", "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        "sae_lens_training_version": "3.0.0", "normalize_activations": "none",
    }  # fmt: skip
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    for case, extra in (("old_standard", {"activation_fn_str": "relu"}), ("old_topk", topk)):
        sae("standard").save_model(folder / case)
        (folder / case / "cfg.json").write_text(json.dumps({**flat, **extra}))
        tell(folder, case)


def unmapped(folder: Path) -> None:
    """What no column of an encoder can stand for."""
    for norm in ("layer_norm", "constant_norm_rescale", "expected_average_only_in",
                 "covariance_whitening"):  # fmt: skip
        sae("standard", normalize_activations=norm).save_model(folder / norm)
    before_weight = transcoder("transcoder", hook_name="blocks.2.ln2.hook_normalized")
    before_weight.save_model(folder / "ln2_normalized")
    sae("abstopk", k=K).save_model(folder / "abstopk")
    sae("matching_pursuit", max_iterations=4).save_model(folder / "matching_pursuit")
    heads = sae_lens.StandardSAEConfig(
        **SIZES,
        reshape_activations="hook_z",
        metadata=SAEMetadata(model_name="tiny", hook_name="blocks.3.attn.hook_z"),
    )
    sae_lens.StandardSAE(heads).save_model(folder / "hook_z")


def gemma_scope(folder: Path) -> None:
    """Gemma Scope's ``params.npz`` under the names of its repositories, read by SAELens' loader."""
    saes = "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    transcoders = "gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_6"
    file = _params(folder / saes)
    _params(folder / transcoders)
    repository, _, inside = saes.partition("/")
    with patch.object(loaders, "hf_hub_download", lambda **_: str(file)):  # nothing is downloaded
        config, state, _ = loaders.gemma_2_sae_huggingface_loader("google/" + repository, inside)
    config = loaders.handle_config_defaulting({**config, "d_sae": D_SAE, "d_in": D_MODEL})
    loaded = sae_lens.SAE.from_dict(config)
    loaded.load_state_dict(state)
    write(folder, "gemma_scope", loaded.encode, loaded.decode)


def _params(folder: Path) -> Path:
    names = {"W_enc": (D_MODEL, D_SAE), "W_dec": (D_SAE, D_MODEL), "b_enc": (D_SAE,),
             "b_dec": (D_MODEL,), "threshold": (D_SAE,)}  # fmt: skip
    tensors = {name: torch.empty(shape) for name, shape in names.items()}
    randomise(tensors, seed=7)
    file = folder / "params.npz"
    file.parent.mkdir(parents=True)
    np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return file


def main(folder: Path) -> None:
    """Write every case."""
    mapped(folder)
    old(folder)
    unmapped(folder)
    gemma_scope(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
