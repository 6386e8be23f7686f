"""Everything dav-bench ships, registered through the hooks that any plugin uses. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass

from dav_bench.builtin import image_rewards, particles, parts, toy
from dav_bench.builtin.diffusion import EmojiDiffusion, Pipeline
from dav_bench.builtin.gosai import GosaiModel, GosaiReward
from dav_bench.builtin.methods import (
    DAV,
    DAVKL,
    DDPO,
    DPO,
    DPOK,
    FAV,
    GRPO,
    RWR,
    SVDD,
    SVDDMC,
    VIDD,
    VMPO,
    BestOfN,
    Pretrained,
    Real,
)
from dav_bench.builtin.methods.gradient import Adjoint, Draft, Drakes
from dav_bench.builtin.methods.weighted import RewardWeighted
from dav_bench.hookspecs import Register, hookimpl

_STEP = ("sample", "step", "step.log_prob", "step.rsample", "step.tilt", "step.kl", "corrupt", "reference")
_GAUSSIAN = (
    *(f"{name} if eta!=0" if name in ("step.log_prob", "step.tilt", "step.kl") else name for name in _STEP),
    "continuous",
    "step.memoryless if eta=1.0",
)  # a deterministic chain has no densities, and only with all the noise of DDPM does x_0 not depend on x_T
_LATENT = (*(name for name in _GAUSSIAN if "memoryless" not in name), "prompts")
_MASKED = (*_STEP, "tokens")
_TREE = ("step", "step.tilt if guide", "step.log_prob if guide", "reward.grad if guide")
_ANCHOR = ("reference if anchor=ref", "step.log_prob if anchor=ref")
_FIT = ("step.log_prob", "step.kl if kl", "reference if kl")
_PARTICLES = ("step", "step.log_prob", "reference if anchor=ref")  # copies of a particle part by noise alone
_GUIDED = (*_PARTICLES, "step.tilt", "reward.grad")
_PATH = ("sample", "step.rsample", "reward.grad")
_ADJOINT = ("sample", "step", "continuous", "step.memoryless", "reference", "reward.grad")
_PARTICLE_SPACE = ("continuous if features=identity", "reward.features if features=reward")
_WEIGHTED = ("step.log_prob if target=transition", "corrupt if target=denoise")
_DAV_PAPER = "arXiv:2510.00502"


@dataclass(frozen=True)
class Weights:
    """Settings of components read from shipped weights."""

    weights: str = ""
    """Stem of a file in the task's folder `weights`, or path of a safetensors file; empty is the default."""


@hookimpl
def register_methods(register: Register) -> None:
    at = "dav_bench.builtin.methods."
    register("real", at + "baselines:real", config=Real, requires="data", seeded=False,
             summary="real samples of the task's test set: the yardstick")  # fmt: skip
    register("pretrained", at + "baselines:pretrained", config=Pretrained, requires="sample", seeded=False,
             summary="samples of the model before any alignment")  # fmt: skip
    register("exact", "dav_bench.builtin.exact:build", config=toy.Exact, seeded=False,
             requires=("target", "target.samples"),
             summary="exact samples of the tilted law, where it is known: the yardstick")  # fmt: skip
    register("best-of-n", at + "baselines:best_of_n", config=BestOfN, requires="sample", search="best-of",
             summary="the best of n samples of the pretrained model")  # fmt: skip
    register("svdd", at + "baselines:svdd", config=SVDD, requires=(*_TREE, *_ANCHOR), search="tree",
             summary="tree search on the pretrained model at test time", paper="arXiv:2408.08252")  # fmt: skip
    register("svdd-mc", at + "baselines:svdd_mc", config=SVDDMC, requires=("sample", "step"),
             summary="tree search by a value learned from plain samples", paper="arXiv:2408.08252")  # fmt: skip
    register("smc", at + "particles:smc", config=particles.SMC, requires=_PARTICLES, search="smc",
             summary="particles weighed by look-ahead reward and resampled",
             paper="doi:10.1049/ip-f-2.1993.0015")  # fmt: skip
    register("tds", at + "particles:tds", config=particles.TDS, requires=_GUIDED, search="tds",
             summary="particles on steps tilted by the reward gradient, with exact weights",
             paper="arXiv:2306.17775")  # fmt: skip
    register("das", at + "particles:das", config=particles.DAS, requires=_GUIDED, search="das",
             summary="twisted particles with the reward tempered in", paper="arXiv:2501.05803")  # fmt: skip
    register("fk", at + "particles:fk", config=particles.FK, requires=_PARTICLES, search="fk",
             summary="particles steered by Feynman-Kac potentials, the best one kept",
             paper="arXiv:2501.06848")  # fmt: skip
    register("guidance", at + "particles:guidance", config=particles.Guidance, search="guidance",
             requires=("step", "step.log_prob", "step.tilt", "reward.grad"), paper="arXiv:2209.14687",
             summary="steps tilted by the reward gradient, without weights (DPS, classifier guidance)")  # fmt: skip
    register("dav", at + "dav:build", config=DAV, requires=(*_TREE, *_ANCHOR, *_FIT), tunes=True, search="tree",
             summary="search for better trajectories, fit the model to them, repeat", paper=_DAV_PAPER)  # fmt: skip
    register("dav-kl", at + "dav:build", config=DAVKL, requires=(*_TREE, *_ANCHOR, *_FIT), tunes=True, search="tree",
             summary="DAV with a pull to the pretrained model", paper=_DAV_PAPER)  # fmt: skip
    register("draft", at + "gradient:draft", config=Draft, requires=_PATH, tunes=True, search="tree",
             summary="reward gradients through the last steps of sampling, without a KL",
             paper="arXiv:2309.17400")  # fmt: skip
    register("drakes", at + "gradient:drakes", config=Drakes,
             requires=(*_PATH, "step.kl if alpha", "reference if alpha", "tokens if kl_form=release"),
             tunes=True, search="tree",
             summary="reward gradients through relaxed tokens, and a KL of the path",
             paper="arXiv:2410.13643")  # fmt: skip
    register("adjoint", at + "gradient:adjoint", config=Adjoint, requires=_ADJOINT, tunes=True, search="tree",
             summary="reward gradients carried back through the pretrained model and matched by each step",
             paper="arXiv:2409.08861")  # fmt: skip
    register("dpo", at + "preference:build", config=DPO, tunes=True,
             requires=("sample", "corrupt", "reference", "tokens if times=path", "tokens if pairs"),
             summary="denoise the preferred sample of each pair better than the other",
             paper="arXiv:2311.12908")  # fmt: skip
    register("fav", at + "fav:build", config=FAV, requires=(*_PATH, "reference", *_PARTICLE_SPACE), tunes=True,
             summary="move samples by a Stein step to the target, fit the model to them",
             paper="arXiv:2605.26552")  # fmt: skip
    register("ddpo", at + "policy:ddpo", config=DDPO, requires=("sample", *_FIT), tunes=True,
             summary="policy gradient on rewards standardised for each prompt", paper="arXiv:2305.13301")  # fmt: skip
    register("dpok", at + "policy:dpok", config=DPOK, requires=("sample", *_FIT), tunes=True,
             summary="policy gradient with a KL to the pretrained model", paper="arXiv:2305.16381")  # fmt: skip
    register("grpo", at + "policy:grpo", config=GRPO, requires=("sample", *_FIT), tunes=True,
             summary="policy gradient on rewards relative to a group", paper="arXiv:2505.05470")  # fmt: skip
    register("rwr", at + "weighted:rwr", config=RWR, requires=("sample", *_WEIGHTED), tunes=True,
             summary="maximum likelihood of own samples, weighted by reward", paper="arXiv:2305.13301")  # fmt: skip
    register("vidd", at + "weighted:vidd", config=VIDD, tunes=True,
             requires=("sample", "step.log_prob", "reference if prior=ref"),
             summary="distil the soft-optimal step of a lagged model", paper="arXiv:2507.00445")  # fmt: skip
    register("vmpo", at + "weighted:vmpo", config=VMPO, tunes=True,
             requires=("sample", "step.log_prob", "step.kl if kl", "reference"),
             summary="least variance of log importance weights", paper="arXiv:2602.12229")  # fmt: skip


@hookimpl
def register_searchers(register: Register) -> None:
    at = "dav_bench.builtin.parts:"
    register(
        "rollout",
        at + "rollout",
        config=parts.Rollout,
        requires="sample",
        summary="plain samples of the model",
    )
    register(
        "best-of", at + "best_of", config=parts.BestOf, requires="sample", summary="the best of n samples"
    )
    register("tree", at + "tree", config=parts.Tree, requires=(*_TREE, *_ANCHOR),
             summary="children at each step, one picked by its look-ahead reward")  # fmt: skip
    at = "dav_bench.builtin.particles:"
    register("smc", at + "smc", config=particles.SMC, requires=_PARTICLES,
             summary="particles weighed by look-ahead reward and resampled")  # fmt: skip
    register("tds", at + "tds", config=particles.TDS, requires=_GUIDED,
             summary="particles on steps tilted by the reward gradient, with exact weights")  # fmt: skip
    register("das", at + "das", config=particles.DAS, requires=_GUIDED,
             summary="twisted particles with the reward tempered in")  # fmt: skip
    register("fk", at + "fk", config=particles.FK, requires=_PARTICLES,
             summary="particles steered by Feynman-Kac potentials, the best one kept")  # fmt: skip
    register("guidance", at + "guidance", config=particles.Guidance,
             requires=("step", "step.log_prob", "step.tilt", "reward.grad"),
             summary="steps tilted by the reward gradient, without weights")  # fmt: skip


@hookimpl
def register_trainers(register: Register) -> None:
    register("forward-kl", "dav_bench.builtin.parts:forward_kl", config=parts.ForwardKL, requires=_FIT,
             summary="maximum likelihood of the trajectories found, with an optional KL pull")  # fmt: skip
    register("reward-weighted", "dav_bench.builtin.methods.weighted:reward_weighted", config=RewardWeighted,
             requires=_WEIGHTED, summary="maximum likelihood of the samples found, weighted by reward")  # fmt: skip


@hookimpl
def register_models(register: Register) -> None:
    at = "dav_bench.builtin.models."
    register("mdlm-dna", at + "mdlm:build", config=Weights, provides=(*_MASKED, "data"), domain="sequence",
             summary="masked diffusion of 200-base regulatory elements of four human cell types",
             paper="arXiv:2406.07524")  # fmt: skip
    register("gosai", at + "gosai:build", config=GosaiModel, provides=_MASKED, domain="sequence",
             summary="published masked diffusion of measured 200-base enhancers (file not shipped)",
             paper="arXiv:2410.13643")  # fmt: skip
    register("emoji-diffusion", at + "diffusion.model:build_emoji", config=EmojiDiffusion,
             provides=(*_GAUSSIAN, "prompts"), domain="image",
             summary="latent diffusion of emoji from words, 64 x 64 pixels, trained here",
             paper="arXiv:2112.10752")  # fmt: skip
    register("diffusers", at + "diffusion.model:build", config=Pipeline,
             provides=(*_LATENT, "step.memoryless if process=ddim and eta=1.0"), domain="image",
             summary="a pipeline of Stable Diffusion 1-3, SDXL or LCM (path: a folder or hub id; not shipped)",
             paper="arXiv:2112.10752")  # fmt: skip
    register("toy-mixture", at + "mixture:build_mixture", config=toy.ToyMixture,
             provides=(*_GAUSSIAN, "target"), domain="vector",
             summary="mixture of Gaussians whose exact posterior is known; two on a line by default")  # fmt: skip
    register("toy-ring", at + "mixture:build_ring", config=toy.ToyModel,
             provides=(*_GAUSSIAN, "target"), domain="vector",
             summary="eight Gaussians on a circle whose exact posterior is known")  # fmt: skip
    register("toy-tokens", at + "tokens:build_tokens", config=toy.ToyTokens,
             provides=(*_MASKED, "target", "target.samples"), domain="sequence",
             summary="Markov chain of three tokens over four letters whose exact posterior is known")  # fmt: skip
    register("tfbind8", at + "tokens:build_tfbind8", config=toy.TFBind8,
             provides=(*_MASKED, "target", "target.samples"), domain="sequence",
             summary="8-mers of human regulatory DNA, a Markov chain of order 3 with its exact posterior")  # fmt: skip


@hookimpl
def register_rewards(register: Register) -> None:
    at = "dav_bench.builtin.rewards."
    register("hepg2-specificity", at + "dna:build_specificity", config=Weights,
             provides=("reward.grad", "reward.features"), domain="sequence",
             summary="log-odds of open chromatin in HepG2 against other cells")  # fmt: skip
    register("hepg2-specificity-heldout", at + "dna:build_heldout", config=Weights,
             provides=("reward.grad", "reward.features"), domain="sequence",
             summary="the same by another network and seed on other chromosomes")  # fmt: skip
    register("gosai-hepg2", at + "gosai:build", config=GosaiReward, provides="reward.grad", domain="sequence",
             summary="activity in HepG2 by a published Enformer oracle (file not shipped)")  # fmt: skip
    register("gosai-hepg2-heldout", at + "gosai:build_heldout", config=GosaiReward, provides="reward.grad",
             domain="sequence", summary="the same by the oracle of the other chromosomes")  # fmt: skip
    register("toy-mixture", at + "toy:build_mixture", config=toy.Quadratic,
             provides=("reward.grad", "target.samples"), domain="vector",
             summary="minus half the squared distance to a point between the modes")  # fmt: skip
    register("toy-ring", at + "toy:build_ring", provides=("reward.grad", "target.samples"), domain="vector",
             summary="log of a smooth score that rises from mode to mode around the circle")  # fmt: skip
    register("toy-tokens", at + "toy:build_tokens", config=toy.Letters,
             provides=("reward.grad", "reward.features"), domain="sequence",
             summary="number of one letter, and half a point for equal ends")  # fmt: skip
    register("tfbind8", at + "tfbind8:build", provides="reward.grad", domain="sequence",
             summary="measured binding of SIX6 to the 8-mer (E-score), the truth itself")  # fmt: skip
    register("jpeg-compressibility", at + "jpeg:Compressibility", domain="image",
             summary="minus the size as a JPEG file", paper="arXiv:2305.13301")  # fmt: skip
    register("jpeg-incompressibility", at + "jpeg:Incompressibility", domain="image",
             summary="size as a JPEG file", paper="arXiv:2305.13301")  # fmt: skip
    register("colourfulness", at + "colour:Colourfulness", provides="reward.grad", domain="image",
             summary="spread and mean of the opponent colours", paper="doi:10.1117/12.477378")  # fmt: skip
    register("emoji-clip", at + "clip:EmojiReward.load", config=image_rewards.EmojiClip,
             provides=("reward.grad", "reward.features"), domain="image",
             summary="likeness of an emoji to its prompt")  # fmt: skip
    register("emoji-clip-heldout", at + "clip:EmojiReward.load_heldout", config=image_rewards.EmojiClip,
             provides=("reward.grad", "reward.features"), domain="image",
             summary="the same by another network and seed on other drawings")  # fmt: skip
    register("aesthetic", at + "aesthetic:Aesthetic.load", config=image_rewards.Aesthetic,
             provides=("reward.grad", "reward.features"), domain="image",
             summary="predicted rating of the image alone (files not shipped)")  # fmt: skip
    register("imagereward", at + "imagereward:ImageReward.load", config=image_rewards.ImageReward,
             provides="reward.grad", domain="image", paper="arXiv:2304.05977",
             summary="predicted preference for the prompt by ImageReward-v1.0 (file not shipped)")  # fmt: skip


@hookimpl
def register_metrics(register: Register) -> None:
    sequence, dna = "dav_bench.builtin.metrics.sequence:", "dav_bench.builtin.metrics.dna:"
    register("levenshtein", sequence + "levenshtein", role="diversity", unit="set", domain="sequence",
             summary="mean pairwise edit distance")  # fmt: skip
    register("kmer-corr", sequence + "kmer_corr", role="natural", unit="set", domain="sequence",
             summary="Pearson correlation of 3-mer counts with real elements")  # fmt: skip
    register("motif-corr", sequence + "motif_corr", role="natural", unit="set", domain="sequence",
             summary="Spearman correlation of JASPAR motif hits with real elements")  # fmt: skip
    register("log-likelihood", sequence + "log_likelihood", role="natural", unit="sample", domain="sequence",
             summary="approximate log-likelihood under the pretrained model")  # fmt: skip
    register("accessibility", dna + "accessibility", role="quality", unit="sample", reduce="mean",
             domain="sequence", summary="share of samples called open chromatin in HepG2 at all")  # fmt: skip
    exact = "dav_bench.builtin.metrics.exact:"
    register("target-distance", exact + "target_distance", better="down", unit="set", requires="target",
             summary="squared distance to the exact target: pretrained model 1, exact samples 0")  # fmt: skip
    register("target-gap", exact + "target_gap", better="", unit="set", requires="target",
             summary="mean reward minus that of the exact target")  # fmt: skip
    register("target-tv", exact + "target_tv", better="down", unit="set", requires="target",
             summary="total variation between sequences, or modes, and the exact target")  # fmt: skip
    register("target-kl", exact + "target_kl", better="down", unit="set", requires="target", domain="sequence",
             summary="KL(exact target, model) of plain samples, from the law of the model, in nats")  # fmt: skip
    register("entropy", exact + "entropy", role="diversity", better="", unit="set",
             summary="-log chance that two samples are the same sequence or of the same mode, in nats")  # fmt: skip
    register("log-prob", exact + "log_prob", role="natural", better="", unit="sample", reduce="mean",
             summary="exact log-likelihood under the pretrained law, in nats")  # fmt: skip
    register("bound", exact + "bound", unit="sample", reduce="mean", domain="sequence",
             summary="share of 8-mers with an E-score above 0.45, specifically bound by SIX6")  # fmt: skip
    image = "dav_bench.builtin.metrics.image:"
    register("looks-entropy", image + "looks_entropy", role="diversity", unit="set", domain="image",
             summary="entropy of artists and backgrounds within a prompt, in nats")  # fmt: skip
    register("clip-distance", image + "clip_distance", role="diversity", unit="set", domain="image",
             summary="mean cosine distance of two pictures of a prompt in CLIP features")  # fmt: skip
    register("vendi", image + "vendi", role="diversity", unit="set", domain="image", paper="arXiv:2210.02410",
             summary="how many different pictures those of a prompt amount to, in CLIP features")  # fmt: skip
    register("lpips", image + "lpips", role="diversity", unit="set", domain="image", paper="arXiv:1801.03924",
             summary="mean LPIPS of two pictures of a prompt (backbone not shipped)")  # fmt: skip
    register("clipscore", image + "clipscore", unit="sample", reduce="mean", domain="image",
             requires="prompts", paper="arXiv:2104.08718",
             summary="agreement of a picture with its prompt by a CLIP model no method sees")  # fmt: skip
    register("imagereward", image + "imagereward", unit="sample", reduce="mean", domain="image",
             requires="prompts", paper="arXiv:2304.05977",
             summary="ImageReward of a picture and its prompt (weights not shipped)")  # fmt: skip
    register("kid", image + "kid", role="natural", better="down", unit="set", domain="image",
             requires="prompts", paper="arXiv:1801.01401",
             summary="kernel distance to the training pictures of the same prompt, in CLIP features")  # fmt: skip
    gosai = "dav_bench.builtin.metrics.gosai:"
    register("gosai-accessibility", gosai + "accessibility", role="quality", unit="sample", reduce="mean",
             domain="sequence", summary="share of samples the ATAC classifier calls open in HepG2")  # fmt: skip
    register("gosai-kmer-corr", gosai + "kmer_corr", role="natural", unit="set", domain="sequence",
             summary="Pearson correlation of 3-mer counts with the 0.1 % most active elements")  # fmt: skip
    register("gosai-motif-corr", gosai + "motif_corr", role="natural", unit="set", domain="sequence",
             summary="Spearman correlation of motif hits with the 0.1 % most active elements")  # fmt: skip
