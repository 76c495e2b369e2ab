# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of `generate`: `pytest -m gpu`."""

import pytest
import torch

from cases import CELLS
from gru_fast import GRULanguageModel, Sampler, gpu_sampling, sampling
from repository_tools import load

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

pytestmark = pytest.mark.gpu

float32_as = load("benchmarks.precision").float32_as
FORMS = ("cta", "grid", "step")
SIZES = {"cta": 48, "grid": 272, "step": 48}
"""Hidden sizes that the forms have tiles for, on Ampere and later."""
FLIPS = {"float32": 1e-3, "tf32": 5e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Share of draws after given prefixes that may differ from the CPU's in float32."""


def language_model(numbers="float32", H=48, L=1, V=65, cell=CELLS[0]):
    torch.manual_seed(0)
    model = GRULanguageModel(V, None, H, L, cell=cell)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    dtype = getattr(torch, numbers.replace("tf32", "float32"))
    return model, GRULanguageModel(**model.config).to("cuda", dtype)


def pair(*args, **options):
    """The same weights on the CPU in float32 and on the GPU."""
    model, copy = language_model(*args, **options)
    copy.load_state_dict(model.state_dict())
    return model, copy


def drawn(form, model, prompts, **options):
    """The loop of one form; None for the one that is chosen."""
    lengths = (prompts != sampling.PADDING).sum(1)
    options = sampling.SamplingOptions(**options)
    return gpu_sampling.generate(
        model, prompts, lengths, max_new_tokens=options.max_new_tokens, form=form,
        do_sample=options.do_sample, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, min_p=options.min_p, eos=options.eos_token_id, seed=options.seed,
    )  # fmt: skip


def skip_unless_fits(form, model, N):
    reason = gpu_sampling.why_not_form(form, model, N)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("numbers", FLIPS)
@pytest.mark.parametrize("form", FORMS)
def test_draws_after_given_prefixes(form, numbers, cell):
    """Four thousand draws; how many differ from the CPU's is counted."""
    model, copy = pair(numbers, H=SIZES[form], cell=cell)
    with float32_as(numbers):
        skip_unless_fits(form, copy, 4000)
        prompts = torch.randint(0, 65, (4000, 9))
        for rules in ({}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}):
            expected = model.generate(prompts, max_new_tokens=1, seed=3, **rules)[:, -1]
            tokens, _, _ = drawn(form, copy, prompts.cuda(), max_new_tokens=1, seed=3, **rules)
            flips = float((tokens[:, 0].cpu() != expected).float().mean())
            print(f"{form} {numbers} {cell} {rules}: {flips:.2e}")
            assert flips <= FLIPS[numbers]


@pytest.mark.parametrize("form", FORMS)
class TestForm:
    @pytest.mark.parametrize("layers", [1, 2])
    def test_score_gives_back_the_log_probabilities(self, form, layers):
        _, model = pair("bfloat16", H=SIZES[form], L=layers)
        skip_unless_fits(form, model, 300)
        prompts = torch.randint(0, 65, (300, 5), device="cuda")
        tokens, log_probs, _ = drawn(form, model, prompts, max_new_tokens=60, seed=1)
        scores = model.score(torch.cat([prompts, tokens], 1))[:, 5:]
        assert float((scores - log_probs).abs().max()) < 0.3

    def test_runs_repeat_bit_by_bit(self, form):
        _, model = pair("bfloat16", H=SIZES[form])
        skip_unless_fits(form, model, 300)
        prompts = torch.randint(0, 65, (200, 3), device="cuda")
        steps = 300 if form == "step" else 9000
        runs = [drawn(form, model, prompts, max_new_tokens=steps, seed=2) for _ in range(3)]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))

    def test_bad_logits(self, form):
        _, model = pair("bfloat16", H=SIZES[form])
        skip_unless_fits(form, model, 300)
        with torch.no_grad():
            model.head.bias[3] = torch.nan
        prompts = torch.randint(0, 65, (20, 3), device="cuda")
        with pytest.raises(ValueError, match="logits: expected no NaN"):
            drawn(form, model, prompts, max_new_tokens=5)


@pytest.mark.parametrize(
    "H, L, V", [(64, 1, 65), (64, 2, 65), (128, 1, 256), (256, 2, 65), (512, 1, 256), (1030, 1, 9)]
)
def test_generate_as_a_user_calls_it(H, L, V):
    """Greedy in float32 without TF32: the CPU's tokens."""
    model, copy = pair("float32", H=H, L=L, V=V)
    prompts = [[1, 2], [], [3, 4, 5]]
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    expected = Sampler(model).generate(prompts, **options)
    with float32_as("float32"):
        found = copy.generate(prompts, **options)
    same = float((found.sequences.cpu() == expected.sequences).float().mean())
    assert found.sequences.is_cuda and same > 0.99


def test_streamer_and_end_of_sequence():
    _, model = pair("bfloat16")
    seen = []

    class Collect:
        put = seen.append

        def end(self):
            seen.append("end")

    tokens = model.generate(
        [[1], [2, 3]], max_new_tokens=200, eos_token_id=7, seed=5, streamer=Collect()
    )
    assert seen[-1] == "end" and len(seen) - 2 >= tokens.shape[1] - 2
