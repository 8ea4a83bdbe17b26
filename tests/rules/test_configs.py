"""Every configuration that ships is accepted, with the size it is known for, or is refused for the reason said here.

    configs/*.yml, configs/models/    native: accepted, and all that follows from them derived
    configs/gptneox/                  twins of GPT-NeoX's files: a row of TWINS or REFUSED for each

REFUSED is a list of what is missing: a row fails as soon as its file can be accepted, and then
belongs into TWINS.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from castalia.config import Config, load
from castalia.config.derive import derive
from castalia.config.load import read_gptneox
from castalia.errors import UserError
from castalia.model.size import model_size

ROOT = Path(__file__).resolve().parents[2]
GPTNEOX = ROOT / "configs" / "gptneox"
CONFIGS = sorted(f for suffix in ("*.yml", "*.yaml") for f in (ROOT / "configs").rglob(suffix))
NATIVE = [f for f in CONFIGS if GPTNEOX not in f.parents]
VOCABULARY = 50257  # of no consequence where a file says its vocabulary


def gpt(layers: int, hidden: int, vocabulary: int = 50304) -> int:
    """Parameters of a GPT with biases and untied matrices: 2 V h + L (12 h^2 + 13 h) + 2 h."""
    return 2 * vocabulary * hidden + layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden


def gmlp(layers: int, hidden: int, places: int, vocabulary: int = 50304) -> int:
    """Parameters of an untied gMLP: 2 V h + 2 h, and for each layer up, down, two norms and the weights of places."""
    layer = (8 * hidden**2 + 8 * hidden) + (4 * hidden**2 + hidden) + 2 * hidden + 8 * hidden + places**2 + places
    return 2 * vocabulary * hidden + layers * layer + 2 * hidden


# Counts of the released checkpoints, or for sizes that were never released the formula above.
SIZES = {
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
    "gpt3-125m": gpt(12, 768),
    "gpt3-350m": gpt(24, 1024),
    "gpt3-760m": gpt(24, 1536),
    "gpt3-1.3b": gpt(24, 2048),
    "gpt3-2.7b": gpt(32, 2560),
    "gpt3-6.7b": gpt(32, 4096),
    "gpt3-13b": gpt(40, 5120),
    "gpt3-175b": gpt(96, 12288),
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    # What the checkpoint holds; the model card says 6_053_381_344.
    "gpt-j-6b": 6_050_882_784,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
}

# Files that are accepted: with which others, the padded vocabulary, and the parameters.
TWINS: dict[str, tuple[str, int, int]] = {
    "19M.yml": ("", 50304, gpt(6, 512)),
    "49M.yml": ("", 50304, gpt(10, 640)),
    "125M.yml": ("", 50304, gpt(12, 768)),
    # 8 experts of 2 x 768 x 3072 and a router of 8 x 768 in place of each MLP and its biases.
    "125M-dmoe.yml": ("", 50304, gpt(12, 768) + 12 * (7 * 2 * 768 * 3072 + 8 * 768 - 3072 - 768)),
    "125M-json.yml": ("", 50304, gpt(12, 768)),
    "350M.yml": ("", 50304, gpt(24, 1024)),
    "760M.yml": ("", 50304, gpt(24, 1536)),
    "800M.yml": ("", 50304, gpt(16, 2048)),
    "1-3B.yml": ("", 50304, gpt(24, 2048)),
    "1-3B-transformer-engine.yml": ("", 50304, gpt(24, 2048)),
    "2-7B.yml": ("", 50304, gpt(32, 2560)),
    "6-7B.yml": ("", 50304, gpt(32, 4096)),
    "13B.yml": ("", 50304, gpt(40, 5120)),
    "175B.yml": ("", 50304, gpt(96, 12288)),
    "bf16_125M.yml": ("", 50304, gpt(12, 768)),
    "bnb_125M.yml": ("", 50304, gpt(12, 768)),
    "slurm_125M.yml": ("", 50304, gpt(12, 768)),
    "cpu_mock_config.yml": ("125M.yml", 50304, gpt(12, 768)),
    "eleutherai_cluster.yml": ("125M.yml", 50304, gpt(12, 768)),
    "local_setup.yml": ("125M.yml", 50304, gpt(12, 768)),
    "local_setup_comet.yml": ("125M.yml", 50304, gpt(12, 768)),
    "local_setup_wandb.yml": ("125M.yml", 50304, gpt(12, 768)),
    "prof.yml": ("125M.yml", 50304, gpt(12, 768)),
    "slurm_local.json": ("slurm_125M.yml", 50304, gpt(12, 768)),
    "slurm_local.yml": ("slurm_125M.yml", 50304, gpt(12, 768)),
    "text_generation.yml": ("125M.yml", 50304, gpt(12, 768)),
    "20B.yml": ("", 50432, 20_554_567_680),
    "gmlp_small.yml": ("", 50304, gmlp(12, 768, 2048)),
    "sparse.yml": ("125M.yml", 50304, gpt(12, 768)),
    "mistral/7B.yml": ("llama/train_config.yml", 32000, 7_241_732_096),
    "docker/pythia-paths.yml": ("pythia/70M.yml", 50304, 70_426_624),
    "finetuning_configs/6-9B.yml": ("", 50432, 6_857_302_016),
    "post-training/llama3-8b-sft.yml": ("", 128256, 8_030_261_248),
    "pythia/14M.yml": ("", 50304, 14_067_712),
    "pythia/31M.yml": ("", 50304, 30_494_720),
    "pythia/70M.yml": ("", 50304, 70_426_624),
    "pythia/160M.yml": ("", 50304, 162_322_944),
    "pythia/410M.yml": ("", 50304, 405_334_016),
    "pythia/1B.yml": ("", 50304, 1_011_781_632),
    "pythia/1-4B.yml": ("", 50304, 1_414_647_808),
    "pythia/2-8B.yml": ("", 50304, 2_775_208_960),
    "pythia/6-9B.yml": ("", 50432, 6_857_302_016),
    "pythia/12B.yml": ("", 50688, 11_846_072_320),
    "llama/7B.yml": ("llama/train_config.yml", 32000, 6_738_415_616),
    "llama/13B.yml": ("llama/train_config.yml", 32000, 13_015_864_320),
    "llama/30B.yml": ("llama/train_config.yml", 32000, 32_528_943_616),
    "llama/65B.yml": ("llama/train_config.yml", 32000, 65_285_660_672),
    "llama/train_config.yml": ("llama/7B.yml", 32000, 6_738_415_616),
    "llama2/7B.yml": ("llama/train_config.yml", 32000, 6_738_415_616),
    "llama2/13B.yml": ("llama/train_config.yml", 32000, 13_015_864_320),
    "llama2/70B.yml": ("llama/train_config.yml", 32000, 68_976_648_192),
    "llama2/codellama_7B.yml": ("llama/train_config.yml", 32016, 6_738_546_688),
    "llama2/codellama_34B.yml": ("llama/train_config.yml", 32000, 33_743_970_304),
    "llemma/7B.yml": ("", 32016, 6_738_546_688),
    "llemma/34B.yml": ("", 32000, 33_743_970_304),
}

# Files that are refused: with which others, the key at fault, and what would have to be there.
REFUSED: dict[str, tuple[str, str, str]] = {
    "rwkv/170M.yml": ("", "attention_config", "layers of kind rwkv"),
    **{
        f"autotuning_configs/{name}.json": ("", "train_micro_batch_size_per_gpu", "a search for the batch size")
        for name in ("small_tune", "tune", "tune_1-3B", "tune_6-7B")
    },
    **{
        f"mamba/mamba-{size}.yml": ("", "attention_config", "layers of kind mamba")
        for size in ("130M", "370M", "790M", "1.4B", "2.8B")
    },
    "post-training/llama3-8b-dpo.yml": ("", "pos_train_data_paths", "data sets of rewards or pairs"),
    "post-training/llama3-8b-kto.yml": ("", "train_reward_data_paths", "data sets of rewards or pairs"),
    "post-training/llama3-8b-rm.yml": ("", "pos_train_data_paths", "data sets of rewards or pairs"),
    "post-training/llama3-8b-reinforce.yml": ("", "dataset_impl", "data sets of pairs or online data"),
    "post-training/benchmarking/mistral-dpo.yml": ("", "pos_train_data_paths", "data sets of rewards"),
    "post-training/benchmarking/llama-13b-dpo.yml": ("", "pos_train_data_paths", "data sets of rewards"),
}


def load_and_derive(paths: list[Path], vocabulary: int | None) -> Config:
    """The complete configuration of some files."""
    return derive(load(paths), vocabulary)[0]


def with_file(name: str, other: str) -> list[Path]:
    """A twin and what it is laid over."""
    return [GPTNEOX / n for n in (other, name) if n]


def test_some_configurations_ship():
    assert [f.name for f in CONFIGS if f.name == "demo.yml"] == ["demo.yml"]
    assert {f.stem for f in NATIVE if f.parent.name == "models"} == SIZES.keys()


@pytest.mark.parametrize("path", NATIVE, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_a_shipped_configuration_is_right(path):
    said = load([path]).model.vocab_size
    config = load_and_derive([path], None if said else VOCABULARY)
    assert config.model.vocab_size >= (said or VOCABULARY)
    if path.stem in SIZES:
        assert config.name == path.stem
        assert model_size(config).total_parameters == SIZES[path.stem]


def test_every_twin_has_a_row():
    files = {f.relative_to(GPTNEOX).as_posix() for f in GPTNEOX.rglob("*") if f.suffix in (".yml", ".json")}
    assert files == TWINS.keys() | REFUSED.keys()
    assert not TWINS.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_accepted_and_has_its_size(name):
    other, vocabulary, parameters = TWINS[name]
    # The last id of the vocabulary: padding must lead to the size that is known.
    config = load_and_derive(with_file(name, other), vocabulary - (27 if 50000 < vocabulary < 100000 else 0))
    assert model_size(config).total_parameters == parameters
    assert config.model.vocab_size == vocabulary


@pytest.mark.parametrize("name", REFUSED)
def test_a_twin_is_refused_for_its_key(name):
    other, key, what = REFUSED[name]
    with pytest.raises(UserError) as error:
        load(with_file(name, other))
    message = str(error.value)
    assert f"'{key}'" in message
    assert f"asks for {what}" in message
    assert "which is not implemented yet" in message
    assert Path(name).name in message or not other


@pytest.mark.parametrize("name", [*TWINS, *REFUSED])
def test_a_twin_reads_the_same_by_the_rules_of_yaml_1_1(name):
    # GPT-NeoX reads YAML 1.1, where 1e-5 is text and yes is true: its users may take these files back.
    import yaml

    text = (GPTNEOX / name).read_text(encoding="utf-8")
    assert yaml.safe_load(text) == read_gptneox([GPTNEOX / name]).values


@pytest.mark.parametrize(
    ("native", "twin"),
    [
        ("pythia-160m", "pythia/160M.yml"),
        ("pythia-12b", "pythia/12B.yml"),
        ("gpt3-1.3b", "1-3B.yml"),
        ("llama-7b", "llama/7B.yml"),
        ("llama2-70b", "llama2/70B.yml"),
    ],
)
def test_native_and_twin_describe_one_model(native, twin):
    other, vocabulary, _ = TWINS[twin]
    models = [
        load_and_derive([ROOT / "configs" / "models" / f"{native}.yml"], None).model.model_dump(),
        load_and_derive(with_file(twin, other), vocabulary).model.model_dump(),
    ]
    for values in models:
        del values["vocab_multiple"]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 1\nmodle:\n  num_layers: 2\n", "modle"),
        ("version: 1\nmodel:\n  num_layers: two\n", "num_layers"),
        ("version: 1\nmodel:\n  hidden_size: 100\n  num_attention_heads: 3\n", "num_attention_heads"),
    ],
)
def test_a_wrong_configuration_is_seen(tmp_path, text, said):
    path = tmp_path / "wrong.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load_and_derive([path], VOCABULARY)
