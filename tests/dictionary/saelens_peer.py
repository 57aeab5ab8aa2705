"""Run by a Python that has sae-lens: reads our folders, writes its own, and tells what it computes on both.

``python saelens_peer.py WORK`` with ``WORK/x.safetensors`` and ``WORK/ours/NAME``; it makes ``WORK/theirs/NAME`` and
``WORK/told.safetensors`` with ``ours.NAME.codes``, ``ours.NAME.out`` and the same of ``theirs``.
"""

import sys
from pathlib import Path

import torch

D_IN, D_SAE, D_OUT, K = 8, 30, 5, 4
THEIRS = {
    "standard": ("StandardSAE", {}),
    "standard_plain": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "standard_bfloat16": ("StandardSAE", {"dtype": "bfloat16"}),
    "topk": ("TopKSAE", {"k": K}),
    "topk_rescaled": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("AbsTopKSAE", {"k": K}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "gated_plain": ("GatedSAE", {"apply_b_dec_to_input": False}),
    "matching_pursuit": ("MatchingPursuitSAE", {"max_iterations": 5}),
    "matching_pursuit_far": ("MatchingPursuitSAE", {"residual_threshold": 0.7, "apply_b_dec_to_input": False}),
    "matching_pursuit_long": ("MatchingPursuitSAE", {"stop_on_duplicate_support": False, "residual_threshold": 0.0}),
    "transcoder": ("Transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu_transcoder": ("JumpReLUTranscoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
}


def tell(told, name, sae, x):
    with torch.no_grad():
        codes = sae.encode(x)
        told[f"{name}.codes"], told[f"{name}.out"] = codes.float().contiguous(), sae.decode(codes).float().contiguous()


def main(work):
    import sae_lens
    from safetensors.torch import load_file, save_file

    told, x = {}, load_file(work / "x.safetensors")["x"]
    for folder in sorted((work / "ours").iterdir()):
        tell(told, f"ours.{folder.name}", sae_lens.SAE.load_from_disk(folder), x)
    torch.manual_seed(0)
    for name, (kind, options) in THEIRS.items():
        config = getattr(sae_lens, f"{kind}Config")(d_in=D_IN, d_sae=D_SAE, **options)
        config.metadata["model_name"] = "toy"
        sae = getattr(sae_lens, kind)(config)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
            if "threshold" in dict(sae.named_parameters()):
                sae.threshold[0] = -1.0
            if "Pursuit" in kind:
                sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        sae.save_model(work / "theirs" / name)
        tell(told, f"theirs.{name}", sae, x)
    save_file(told, work / "told.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
