"""Latent diffusion against diffusers itself, on a tiny random pipeline of every family that was saved and loaded."""

import copy
import shutil
import warnings

import pytest
import torch
from pipelines import CONTEXT, KINDS, SIDE, brightness, context, disturb, folder, model

from dav_bench.builtin.diffusion import Pipeline
from dav_bench.builtin.models.diffusion.model import build
from dav_bench.builtin.models.diffusion.pipelines import quiet
from dav_bench.core import Meter, Noise, Rollout, TreeSearch
from dav_bench.core.search import _CHILD, _PRIOR
from dav_bench.errors import DavBenchError, ExitCode

TEXTS = ("cat", "red dog")
COND = torch.tensor([1, 0, 1])


def plain(kind: str):
    """The pipeline as diffusers loads it, with the sampler that we take it to have."""
    import diffusers

    with quiet():
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder(kind))
        if kind in ("sd", "sd-v", "sdxl"):
            pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, latents: torch.Tensor, steps: int, guidance: float, **options) -> torch.Tensor:
    """What diffusers makes of these latents at the prompts COND, without noise of its own."""
    with quiet(), torch.no_grad():
        return pipe(
            [TEXTS[k] for k in COND], latents=latents, num_inference_steps=steps, guidance_scale=guidance,
            output_type="latent", height=SIDE, width=SIDE, **options,
        ).images  # fmt: skip


def start(made, n: int = 3) -> torch.Tensor:
    """x_T of the streams 0 ... n − 1."""
    return made.process.prior(Noise.of(0, n).fold(_PRIOR))


def sampled(made, n: int = 3) -> torch.Tensor:
    return Rollout(keep=False)(context(made), Noise.of(0, n), COND[:n]).states[-1]


# ---- samplers and networks


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "lcm"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_without_noise_a_trajectory_is_that_of_the_pipeline(kind, guidance):
    made = model(kind, eta=0.0, guidance=guidance)
    assert torch.allclose(sampled(made), drawn(plain(kind), start(made), 4, guidance), atol=1e-5)
    assert made.meter.total("forward") == 3 * 4 * (2 if guidance > 1 else 1)
    assert not made.provides & {"step.log_prob", "step.tilt", "step.kl"}


@pytest.mark.parametrize("kind", ["sd", "sd-v"])
def test_with_the_same_noise_a_trajectory_is_that_of_the_ddim_scheduler(kind):
    made, scheduler = model(kind, eta=1.0, guidance=3.0, steps=5), plain(kind).scheduler
    scheduler.set_timesteps(5)
    noise = Noise.of(0, 3)
    states = Rollout()(context(made), noise, COND).states
    x = states[0]
    for i, t in zip(range(5, 0, -1), scheduler.timesteps, strict=True):
        assert torch.allclose(made.process.time(i, x) * 1000, t.float())
        with torch.no_grad():
            pred = made.predict(x, i, COND)
        z = noise.fold(i, _CHILD).normal(*x.shape[1:])
        x = scheduler.step(pred, int(t), x, eta=1.0, variance_noise=z, return_dict=False)[0]
        assert torch.allclose(x, states[6 - i], atol=1e-5)
    assert made.process.step(x, x, 1).stochastic, "set_alpha_to_one is false: the last step has noise too"


def test_with_the_same_noise_a_trajectory_is_that_of_the_lcm_pipeline(monkeypatch):
    made, noise = model("lcm", guidance=3.0), Noise.of(0, 3)
    states = Rollout()(context(made), noise, COND).states
    left = [noise.fold(i, _CHILD).normal(4, 8, 8) for i in (4, 3, 2)]
    at = "diffusers.schedulers.scheduling_lcm.randn_tensor"
    monkeypatch.setattr(at, lambda shape, **options: left.pop(0))
    assert torch.allclose(states[-1], drawn(plain("lcm"), states[0], 4, 3.0), atol=1e-5)
    assert not left
    assert made.meter.total("forward") == 3 * 4, "guidance is distilled: it is told, and costs no row"
    assert "step.log_prob" in made.provides and "step.memoryless" not in made.provides
    assert [made.process.step(states[0], states[0], i).stochastic for i in (4, 1)] == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing_but_the_size_of_calls(kind):
    made = model(kind, guidance=2.0, disturbed=0.1, steps=2)
    sizes = []
    made.denoiser.backbone.register_forward_pre_hook(
        lambda module, args, options: sizes.append(len(args[0])), with_kwargs=True
    )
    whole = Rollout()(context(made), Noise.of(0, 3), COND)
    parts = Rollout()(context(made, micro_batch=4), Noise.of(0, 3), COND)
    assert torch.allclose(whole.states, parts.states, atol=1e-5)
    assert torch.allclose(whole.reward, parts.reward, atol=1e-5)
    assert sizes == ([3, 3, 3, 3] if kind == "lcm" else [6, 6, 4, 2, 4, 2])
    alone = Rollout()(context(made), Noise.of(0, 3)[1:2], COND[1:2])
    assert torch.allclose(alone.states, whole.states[:, 1:2], atol=1e-5)


def test_a_call_is_bounded_by_its_latents_too():
    made = model("sd")
    assert made.attach(Meter()).micro_batch == made.attach(Meter(), 10_000).micro_batch == 2**10 // 64
    assert made.attach(Meter(), 5).micro_batch == 5
    assert model("sd", guidance=2.0).attach(Meter(), 5).micro_batch == 2


def test_autocast_leaves_states_adapters_and_pixels_in_float32():
    made = model("sd", guidance=3.0, disturbed=0.1)
    x = start(made)
    exact = made.predict(x, 3, COND).detach()
    made.to("cpu", torch.bfloat16)
    fast = made.predict(x, 3, COND)
    assert fast.dtype == made.dtype == made.decode(x).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in made.trainable().values())
    assert not torch.equal(fast, exact)
    assert torch.allclose(fast, exact, atol=0.1 * float(exact.abs().max()))


def test_prompts_reach_the_denoiser_and_no_prompt_is_the_empty_one():
    made, x = model("sd", guidance=1.0), torch.zeros(2, 4, 8, 8)
    given = made.predict(x, 2, torch.tensor([0, 1]))
    assert not torch.allclose(given[0], given[1])
    without = made.predict(x, 2)
    assert torch.equal(without, made.predict(x, 2, torch.tensor([2, 2]))), "the empty prompt comes last"
    strong = model("sd", guidance=5.0)
    assert torch.allclose(
        strong.predict(x, 2, torch.tensor([0, 1])), without + 5 * (given - without), atol=1e-5
    )
    assert torch.allclose(strong.predict(x, 2), without, atol=1e-5)


def test_guided_search_costs_the_formula_with_both_rows_of_guidance():
    """dav.md G.1: T + (T − 1) M pairs of rows, T of them backward; the last step has M children, as it has noise."""
    made = model("sd", guidance=5.0, steps=3)
    ctx = context(made)
    TreeSearch(4, 0.1, guide=True)(ctx, Noise.of(0, 2), COND[:2])
    assert ctx.meter.total("forward") == 2 * 2 * (3 + 2 * 4)
    assert ctx.meter.total("backward") == 2 * 2 * 3
    assert ctx.meter.total("reward") == 2 * (3 * 4 + 3)


# ---- what is trained


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_the_attention_are_all_that_is_trained(kind):
    made = model(kind)
    names = set(made.trainable())
    assert names and all(".lora_A." in n or ".lora_B." in n for n in names)
    layers = {name.split(".lora_")[0].split(".", 1)[1] for name in names}
    assert {layer.split(".attn")[1].partition(".")[2] for layer in layers} >= {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    assert all(min(p.shape) == 4 for p in made.trainable().values()), "rank 4"
    assert not any("/" in n for n in names)
    assert not any(p.requires_grad for p in made.vae.parameters())
    assert list(names) == list(names) and made.reference().trainable() == {}
    again = model(kind)
    assert all(torch.equal(p, again.trainable()[n]) for n, p in made.trainable().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_same_network_without_adapters(kind):
    made = model(kind, guidance=2.0)
    x = start(made)
    before = made.predict(x, 3, COND)
    assert torch.equal(made.reference().predict(x, 3, COND), before)
    disturb(made, 0.1)
    assert not torch.allclose(made.predict(x, 3, COND), before, atol=1e-3)
    assert torch.equal(made.reference().predict(x, 3, COND), before)
    assert all(p.requires_grad for p in made.trainable().values())
    own = {p.data_ptr() for p in made.network.parameters()}
    assert {p.data_ptr() for p in made.reference().network.parameters()} < own, "no copy"


def test_full_tuning_trains_every_weight_against_a_frozen_copy():
    made = model("sd", adapter="full")
    assert len(made.trainable()) == len(list(made.denoiser.backbone.parameters()))
    x = start(made)
    before = made.predict(x, 3, COND)
    disturb(made, 0.01)
    assert not torch.allclose(made.predict(x, 3, COND), before)
    assert torch.equal(made.reference().predict(x, 3, COND), before)
    assert not made.reference().trainable()


def gradients(made, on_reference: bool = False) -> list[torch.Tensor]:
    x = start(made).requires_grad_(True)
    with torch.enable_grad():
        pred = (made.reference() if on_reference else made).predict(x, 2, COND)
        if on_reference:  # the policy runs in between, with its adapters
            made.predict(x.detach(), 2, COND)
        value = brightness(made.decode(pred)).sum()
        wanted = [x] if on_reference else [x, *made.trainable().values()]
        return list(torch.autograd.grad(value, wanted))


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_checkpointed_gradients_are_the_same_with_and_without_adapters(kind):
    usual, saving = (
        model(kind, disturbed=0.1, guidance=2.0, gradient_checkpointing=flag) for flag in (False, True)
    )
    for on_reference in (False, True):
        pairs = zip(gradients(usual, on_reference), gradients(saving, on_reference), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
        assert any(g.abs().max() > 0 for g in gradients(saving, on_reference))
    assert saving.denoiser.adapted


def test_copies_and_states_hold_what_is_trained_and_share_the_rest():
    made = model("sd", disturbed=0.1)
    network = made.denoiser
    old = copy.deepcopy(network).requires_grad_(False)
    assert set(old.state_dict()) == set(made.trainable())
    shared = {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in old.parameters()}
    assert len(shared) == len(list(network.parameters())) - len(made.trainable())
    x = start(made)
    lagged = made.with_network(old).predict(x, 3, COND)
    assert torch.equal(lagged, made.predict(x, 3, COND))
    disturb(made, 0.1, seed=2)
    assert torch.equal(made.with_network(old).predict(x, 3, COND), lagged)
    made.reference().predict(x, 3, COND)
    assert not any(p.requires_grad for p in old.parameters())
    old.load_state_dict(network.state_dict())
    assert torch.equal(made.with_network(old).predict(x, 3, COND), made.predict(x, 3, COND))
    with pytest.raises(KeyError):
        old.load_state_dict({})


# ---- what other tools load


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_what_a_run_saves(kind, tmp_path):
    steps = 1 if kind == "lcm" else 3
    made = model(kind, eta=0.0, guidance=2.0, steps=steps, disturbed=0.2, alpha=8.0)
    made.save(tmp_path / "lora")
    assert [p.name for p in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = plain(kind)
    before = drawn(pipe, start(made), steps, 2.0)
    with quiet():
        pipe.load_lora_weights(tmp_path / "lora")
    ours, theirs = sampled(made), drawn(pipe, start(made), steps, 2.0)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(before, theirs, atol=1e-2)
    images = pipe.image_processor.postprocess(
        pipe.vae.decode(theirs / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)).sample,
        output_type="pt",
    )  # fmt: skip
    assert torch.allclose(made.decode(ours), images, atol=1e-4)


def test_diffusers_loads_a_denoiser_that_was_tuned_in_full(tmp_path):
    from diffusers import UNet2DConditionModel

    made = model("sd", adapter="full", disturbed=0.01, eta=0.0)
    made.save(tmp_path)
    pipe = plain("sd")
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.allclose(sampled(made), drawn(pipe, start(made), 4, 1.0), atol=1e-5)


# ---- pixels


def test_pixels_are_decoded_in_chunks_with_gradients_and_in_range():
    made = model("sd3").attach(Meter(), micro_batch=2)
    sizes = []
    made.vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    z = (3 * Noise.of(0, 5).normal(4, 8, 8)).requires_grad_(True)
    images = made.decode(z)
    assert images.shape == (5, 3, SIDE, SIDE)
    assert images.min() >= 0 and images.max() <= 1
    assert sizes == [2, 2, 1]
    (g,) = torch.autograd.grad(brightness(images).sum(), z)
    assert g.abs().flatten(1).max(1).values.min() > 0
    moved = z.detach() + 1e-2 * g
    assert (brightness(made.decode(moved)) > brightness(images)).all()


def test_a_reward_of_latents_calls_no_decoder(monkeypatch):
    def energy(latents, cond=None):
        return -(latents**2).flatten(1).mean(1)

    energy.domain = "latent"
    made = model("sd", steps=2)
    monkeypatch.setattr(made.vae, "decode", None)
    ctx = context(made, energy)
    batch = TreeSearch(2, 0.1, guide=True)(ctx, Noise.of(0, 2), COND[:2])
    assert torch.allclose(batch.reward, energy(batch.states[-1]))


# ---- prompts


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_encoder_reads_each_prompt_once_and_is_let_go(kind):
    made = model(kind, texts=())
    rows = []
    for name, part in made.prompts.pipe.components.items():
        if name.startswith("text_encoder"):
            part.register_forward_pre_hook(
                lambda module, args, options: rows.append(len(args[0])), with_kwargs=True
            )
    made.prompts.batch = 2
    made.encode(["one", "two", "three"])
    encoders = {"sdxl": 2, "sd3": 3}.get(kind, 1)
    assert sorted(rows) == [2] * 2 * encoders, "three prompts and the empty one, two at a time"
    Rollout()(context(made), Noise.of(0, 2), COND[:2])
    assert len(rows) == 2 * encoders
    assert made.prompts.pipe is None


def test_an_empty_prompt_of_sdxl_is_zeros_where_its_pipeline_says_so():
    table = model("sdxl").prompts.table
    assert not table["text"][-1].any() and not table["pooled"][-1].any()
    assert table["text"][:-1].abs().flatten(1).sum(1).min() > 0
    assert table["ids"][-1].tolist() == [SIDE, SIDE, 0, 0, SIDE, SIDE]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_long_prompt_is_cut_and_a_warning_says_where(kind):
    made = model(kind, texts=())
    with pytest.warns(UserWarning, match=rf"{CONTEXT} tokens: the prompt is cut after '") as told:
        made.encode(["cat", "a" * (CONTEXT + 5)])
    assert len(told) == 1


def test_an_empty_prompt_is_refused():
    with pytest.raises(DavBenchError, match="prompt 2 of 2 is empty"):
        model("sd", texts=()).encode(["cat", "  "])


# ---- bad input


def refused(match: str, code: ExitCode = ExitCode.USAGE, sampler=None, **settings) -> DavBenchError:
    with pytest.raises(DavBenchError, match=match) as caught:
        build(Pipeline(**{"path": str(folder("sd")), **settings}), sampler or {"steps": 2})
    assert caught.value.code == code
    assert caught.value.fix
    return caught.value


def test_wrong_folders_are_named(tmp_path):
    refused("needs a pipeline", path="")
    refused("no pipeline folder", path=str(tmp_path))
    refused("cannot be had", ExitCode.MISSING, path=str(tmp_path / "absent"))
    inside = refused("no pipeline folder", path=str(folder("sd").parent))
    assert str(folder("sd").parent) in inside.fix
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert "from_single_file" in refused("is a file", path=str(tmp_path / "model.ckpt")).fix
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    refused("does not know", path=str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(DavBenchError, match="cannot be read"):
        build(Pipeline(path=str(tmp_path)), {})


def test_weights_that_are_no_safetensors_are_refused_before_they_are_read(tmp_path):
    path = shutil.copytree(folder("sd"), tmp_path / "old")
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "save_pretrained" in refused("'unet' .* no safetensors", path=str(path)).fix
    shutil.rmtree(path / "vae")
    with pytest.raises(DavBenchError, match="lacks its component 'vae'"):
        build(Pipeline(path=str(path)), {})


def test_a_hub_id_without_a_network_is_one_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused("'nobody/nothing' cannot be had", ExitCode.MISSING, path="nobody/nothing")
    assert "huggingface.co" in error.why and "--set model.path" in error.fix


def test_settings_that_do_not_fit_the_pipeline_are_refused():
    assert "model.size=16" in refused("17 x 17 pixels", size=17).fix
    refused("model.process=lcm", process="lcm")
    refused("eta=1.5", sampler={"steps": 2, "eta": 1.5})
    refused("cannot take 2000 steps", sampler={"steps": 2000})
    refused("cannot take 60 steps", path=str(folder("lcm")), sampler={"steps": 60})
    with pytest.raises(DavBenchError, match="steps=0"):
        build(Pipeline(path=str(folder("sd"))), {"steps": 0})
    with pytest.raises(ValueError, match="rank"):
        Pipeline(rank=0)


def test_another_size_is_drawn_where_the_model_can():
    made = model("sdxl", size=24)
    assert made.process.shape == (4, 12, 12)
    assert sampled(made).shape[1:] == (4, 12, 12)
    assert made.decode(torch.zeros(1, 4, 12, 12)).shape == (1, 3, 24, 24)


def test_nothing_is_said_while_a_pipeline_is_read(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model("sd")
    assert capfd.readouterr() == ("", "")
