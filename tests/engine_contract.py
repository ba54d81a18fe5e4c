"""What every rollout engine must do, checked against Hugging Face's own forward and generate.

A subclass named ``Test...`` in a test module provides ``make_engine``; pytest then runs everything here on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron_oreal.errors import UserError
from megatron_oreal.rollout.engine import Completion, Engine, EngineError, Request, SamplingParams
from megatron_oreal.rollout.hf_weights import write_hf_weights

VOCABULARY = 61
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "qwen2_tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2_untied_mha": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen3_untied": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}),
    "qwen3_tied_mqa": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}),
    "llama_untied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama3_rope": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
}


def save_random_model(folder: Path, name: str, seed: int = 0) -> Path:
    """A tiny model of ``MODELS`` whose every parameter, norms and biases too, is far from its neutral value."""
    family, options = MODELS[name]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, max_position_embeddings=512, eos_token_id=None, bos_token_id=None, **shape, **options
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in parameter_name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    path = folder / f"{name}-{seed}"
    model.save_pretrained(path)
    return path


def hf_model(model_dir: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.no_grad()
def hf_log_probs(model_dir: Path, tokens: Sequence[int], temperature: float) -> torch.Tensor:
    """float32 [len(tokens), vocabulary]: row t is the distribution of token t + 1."""
    return torch.log_softmax(hf_model(model_dir)(torch.tensor([list(tokens)])).logits[0] / temperature, dim=-1)


def make_prompts(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, size=n).astype(np.int32) for n in lengths]


def params(**changes: object) -> SamplingParams:
    """Temperature 1, no filters, no stop token, 12 new tokens, 64 in all."""
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "max_length": 64}
    return SamplingParams(**(defaults | {"stop_token_id": None} | changes))


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions]


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_random_model(folder, name) for name in MODELS}


class EngineContract:
    """Subclasses implement ``make_engine``: an fp32 engine of that model with no weights loaded yet.

    ``families``: what of ``MODELS`` the engine is tried with; where a test is not about the family, another of them
    does. ``draws``: a factor on the number of samples of the statistical tests.
    """

    families: tuple[str, ...] = tuple(MODELS)
    draws = 1.0

    def one_of(self, model_dirs: dict[str, Path], name: str) -> Path:
        """The model ``name``, or one that the engine is tried with."""
        return model_dirs[name if name in self.families else self.families[0]]

    def needs(self, name: str) -> None:
        """Skip a test of a family that the engine is not tried with here."""
        if name not in self.families:
            pytest.skip(f"this class runs {', '.join(self.families)}")

    def make_engine(self, model_dir: Path, *, slots: int, max_length: int) -> Engine:
        raise NotImplementedError

    def ready_engine(self, model_dir: Path, *, slots: int = 4, max_length: int = 256) -> Engine:
        engine = self.make_engine(model_dir, slots=slots, max_length=max_length)
        write_hf_weights(engine, model_dir, version=0)
        return engine

    @pytest.mark.parametrize("name", MODELS)
    def test_greedy_tokens_equal_hugging_face_generate(self, model_dirs, name):
        self.needs(name)
        prompts = make_prompts([1, 2, 7, 30, 3, 65])
        engine = self.ready_engine(model_dirs[name])
        got = engine.generate([Request(p, 0) for p in prompts], params(temperature=0.0, max_length=256))
        reference = hf_model(model_dirs[name])
        for prompt, completion in zip(prompts, got, strict=True):
            ids = torch.tensor(prompt[None], dtype=torch.long)
            mask = torch.ones_like(ids)
            expected = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0)
            assert completion.token_ids.tolist() == expected[0, len(prompt) :].tolist()

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize(
        "sampling", [params(temperature=0.7), params(top_p=0.8, top_k=20), params(temperature=0.0)]
    )
    def test_logp_equals_hugging_face_forward_over_the_full_vocabulary(self, model_dirs, name, sampling):
        self.needs(name)
        prompts = make_prompts([1, 5, 17, 40, 9])
        engine = self.ready_engine(model_dirs[name], slots=3)
        for prompt, completion in zip(
            prompts, engine.generate([Request(p, i) for i, p in enumerate(prompts)], sampling), strict=True
        ):
            tokens = [*prompt.tolist(), *completion.token_ids.tolist()]
            log_probs = hf_log_probs(model_dirs[name], tokens, sampling.temperature or 1.0)
            positions = torch.arange(len(prompt) - 1, len(tokens) - 1)
            expected = log_probs[positions, torch.from_numpy(completion.token_ids).long()].numpy()
            assert completion.logp.dtype == np.float32
            assert completion.token_ids.dtype == np.int32
            np.testing.assert_allclose(completion.logp, expected, atol=1e-5, rtol=0)

    def test_a_sample_depends_on_its_seed_and_not_on_slots_order_or_company(self, model_dirs):
        sampling = params(stop_token_id=7, top_p=0.95, max_new_tokens=40)
        prompts = make_prompts([1, 4, 9, 4, 20])
        # No draw of these seeds is within 1.5e-5 of a border between two tokens: rounding of another batch, or on
        # another processor, moves borders by about 1e-6.
        near = (2, 7, 11, 17, 27, 35)
        requests = [Request(prompts[i % 5], 1000 + i + 1000 * (i in near)) for i in range(40)]
        expected = tokens_of(
            self.ready_engine(self.one_of(model_dirs, "qwen2_tied"), slots=1).generate(requests, sampling)
        )
        assert len({tuple(tokens) for tokens in expected}) == 40
        for slots in (3, 64):
            engine = self.ready_engine(self.one_of(model_dirs, "qwen2_tied"), slots=slots)
            assert tokens_of(engine.generate(requests, sampling)) == expected
        order = np.random.default_rng(0).permutation(40).tolist()
        assert tokens_of(engine.generate([requests[i] for i in order], sampling)) == [expected[i] for i in order]
        assert tokens_of(engine.generate(requests[11:12], sampling)) == expected[11:12]

    def test_sampled_frequencies_match_the_softmax(self, model_dirs):
        prompt, draws = make_prompts([6])[0], int(4000 * self.draws)
        model_dir = self.one_of(model_dirs, "qwen3_untied")
        engine = self.ready_engine(model_dir, slots=256)
        got = engine.generate([Request(prompt, i) for i in range(draws)], params(temperature=1.7, max_new_tokens=1))
        observed = np.bincount([c.token_ids[0] for c in got], minlength=VOCABULARY)
        expected = draws * hf_log_probs(model_dir, prompt, 1.7)[-1].exp().double().numpy()
        often = expected >= 5
        assert expected[~often].sum() < 0.02 * draws
        observed, expected = observed[often], expected[often]
        statistic = ((observed - expected) ** 2 / expected).sum()
        freedom = len(expected) - 1
        assert freedom >= 10
        assert statistic < freedom + 4 * np.sqrt(2 * freedom)

    @pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 5), (0.7, 8)])
    def test_top_p_and_top_k_restrict_the_support_and_report_the_kept_mass(self, model_dirs, top_p, top_k):
        prompt = make_prompts([6])[0]
        model_dir = self.one_of(model_dirs, "qwen3_untied")
        probs = hf_log_probs(model_dir, prompt, 2.5)[-1].exp().double().numpy()
        ranked = np.argsort(-probs)[: top_k or VOCABULARY]
        shares = np.cumsum(probs[ranked]) / probs[ranked].sum()
        allowed = ranked[: int(np.searchsorted(shares, top_p)) + 1] if top_p < 1 else ranked
        engine = self.ready_engine(model_dir, slots=256)
        sampling = params(temperature=2.5, top_p=top_p, top_k=top_k, max_new_tokens=1)
        got = engine.generate([Request(prompt, i) for i in range(int(2000 * self.draws))], sampling)
        assert {int(c.token_ids[0]) for c in got} == set(allowed.tolist())
        assert got[0].kept_mass == pytest.approx(probs[allowed].sum(), abs=1e-5)

    def test_a_response_ends_with_the_stop_token_which_is_part_of_it(self, model_dirs):
        prompts = make_prompts([3, 8])
        requests = [Request(prompts[i % 2], 64 + i) for i in range(32)]  # no draw near a border between two tokens
        engine = self.ready_engine(self.one_of(model_dirs, "llama_untied"))
        endless = tokens_of(engine.generate(requests, params()))
        stop = endless[0][5]
        stopped = engine.generate(requests, params(stop_token_id=stop))
        assert {c.finish_reason for c in stopped} == {"stop", "length"}
        for free, completion in zip(endless, stopped, strict=True):
            cut = free.index(stop) + 1 if stop in free else len(free)
            assert completion.token_ids.tolist() == free[:cut]
            assert completion.logp.shape == (cut,)
            assert completion.finish_reason == ("stop" if stop in free else "length")
            assert completion.kept_mass == 1.0

    def test_max_new_tokens_and_max_length_cut_with_reason_length(self, model_dirs):
        prompts = make_prompts([1, 10, 19])
        engine = self.ready_engine(self.one_of(model_dirs, "qwen2_tied"))
        got = engine.generate([Request(p, 0) for p in prompts], params(max_new_tokens=15, max_length=20))
        assert [len(c.token_ids) for c in got] == [15, 10, 1]
        assert {c.finish_reason for c in got} == {"length"}

    def test_a_prompt_without_room_for_a_response_is_refused_naming_the_lengths(self, model_dirs):
        engine = self.ready_engine(self.one_of(model_dirs, "qwen2_tied"))
        with pytest.raises(UserError, match=r"request 1: a prompt of 20 tokens .* max_length=20"):
            engine.generate([Request(p, 0) for p in make_prompts([3, 20])], params(max_length=20))

    def test_no_requests_give_no_completions(self, model_dirs):
        assert self.ready_engine(self.one_of(model_dirs, "qwen2_tied")).generate([], params()) == []

    @pytest.mark.parametrize(
        "change", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}]
    )
    def test_sampling_parameters_out_of_range_are_refused_by_name(self, model_dirs, change):
        engine = self.ready_engine(self.one_of(model_dirs, "qwen2_tied"))
        with pytest.raises(EngineError, match=next(iter(change))):
            engine.generate([Request(make_prompts([3])[0], 0)], params(**change))

    @pytest.mark.parametrize("prompt", [[], [VOCABULARY], [-1]])
    def test_prompts_that_are_empty_or_outside_the_vocabulary_are_refused(self, model_dirs, prompt):
        engine = self.ready_engine(self.one_of(model_dirs, "qwen2_tied"))
        with pytest.raises(EngineError, match="request 0"):
            engine.generate([Request(np.array(prompt, dtype=np.int32), 0)], params())

    def test_on_complete_reports_each_request_once_as_it_ends(self, model_dirs):
        lengths = [190, 60, 125, 2]  # far enough apart that it does not matter which of them begins first
        requests = [Request(p, i) for i, p in enumerate(make_prompts([193 - n for n in lengths]))]
        seen: list[tuple[int, Completion]] = []
        engine = self.ready_engine(self.one_of(model_dirs, "qwen2_tied"))
        got = engine.generate(
            requests, params(max_new_tokens=199, max_length=193), lambda i, completion: seen.append((i, completion))
        )
        assert [i for i, _ in seen] == [3, 1, 2, 0]
        assert all(completion is got[i] for i, completion in seen)

    def test_new_weights_give_the_new_models_outputs(self, model_dirs, tmp_path):
        old_dir = self.one_of(model_dirs, "llama3_rope")
        new_dir = save_random_model(tmp_path, old_dir.name.removesuffix("-0"), seed=1)
        requests = [Request(p, i) for i, p in enumerate(make_prompts([4, 11, 6]))]
        swapped = self.ready_engine(old_dir)
        before = tokens_of(swapped.generate(requests, params()))
        write_hf_weights(swapped, new_dir, version=1)
        after = tokens_of(swapped.generate(requests, params()))
        assert after == tokens_of(self.ready_engine(new_dir).generate(requests, params()))
        assert all(a != b for a, b in zip(after, before, strict=True))

    def test_states_and_versions(self, model_dirs):
        model_dir, requests = self.one_of(model_dirs, "qwen2_tied"), [Request(make_prompts([4])[0], 0)]
        engine = self.make_engine(model_dir, slots=2, max_length=64)
        assert (engine.health().ok, engine.health().version, engine.health().awake) == (True, -1, True)
        with pytest.raises(EngineError, match="no weights"):
            engine.generate(requests, params())
        write_hf_weights(engine, model_dir, version=3)
        expected = tokens_of(engine.generate(requests, params()))
        for stale in (2, 3):
            with pytest.raises(EngineError, match=f"version {stale} .* version 3"):
                engine.load_weights(stale)
        for _ in range(2):
            engine.sleep()
            assert (engine.health().version, engine.health().awake) == (3, False)
        with pytest.raises(EngineError, match="asleep"):
            engine.generate(requests, params())
        for _ in range(2):
            engine.wake()
        write_hf_weights(engine, model_dir, version=4)
        assert tokens_of(engine.generate(requests, params())) == expected
        for _ in range(2):
            engine.shutdown()
        assert not engine.health().ok
        with pytest.raises(EngineError, match="shut down"):
            engine.generate(requests, params())
