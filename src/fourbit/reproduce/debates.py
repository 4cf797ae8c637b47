"""Questions on which papers about 4-bit training of language models contradict one another, as rows of a table: one small
network, one data order, recipes that differ in one thing each (`fourbit.recipes.catalog.variants`).

    gemms       which product costs most when it alone is in 4 bits: Chmiel et al. (arXiv 2505.19115) blame the backward pass,
                NVIDIA (2509.25149) the forward pass, AMD (2605.09825) wgrad
    rotations   random signs (Tseng et al., 2502.20586), fixed ones (NVIDIA), none at all (AMD), and for which products
    rounding    stochastic for all backward operands (Tseng et al.), for gradients alone (NVIDIA), nowhere (Quartet, 2505.14669)
    end         which side returns to high precision at the end, and when: forward (NVIDIA), backward (Chmiel et al.)
    grid        E2M1, or a uniform grid (UFP4, 2606.20381), with rotations and without
    blocks      16, 32 or 64 elements, and the format of their scale
    families    radix-4 FP4 with one scale per layer (Sun et al., 2020; LUQ) against block scales
    rates       the most telling of these at half and double the learning rate
"""

from __future__ import annotations

from fourbit.reproduce._row import Settings, TableRow

DEBATES: list[TableRow] = []

_COMMON: Settings = {
    "data": "tinyshakespeare",
    "optimizer": "adamw",
    "lr": 0.002,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "alpha_weight_decay": 0.0,
    "gradient_clip": 1.0,
    "schedule": "wsd",
    "batch_size": 16,
    "epochs": 1,
    "observe_every": 0,
}
NETWORKS: dict[str, Settings] = {
    "paper": {
        **_COMMON,
        "model": "gpt?width=512&depth=8&heads=8&context=256",
        "data": "wikitext2",
        "tokenizer": "bpe",
        "lr": 0.001,
        "batch_size": 32,
        "epochs": 10,
        "warmup_steps": 100,
    },
    "small": {
        **_COMMON,
        "model": "gpt?width=128&depth=5&heads=4&context=64",
        "tokenizer": "bpe:512",
        "batch_size": 8,
        "warmup_steps": 20,
        "max_steps": 400,
        "max_test_batches": 32,
    },
    "smoke": {
        **_COMMON,
        "model": "gpt?width=64&depth=2&heads=2&context=64",
        "tokenizer": "bpe:300",
        "max_steps": 3,
        "max_test_batches": 1,
        "log_every": 1,
    },
}
"""What the rows train. `small`: 1.1 million parameters besides the embedding, 205 thousand tokens, a minute or two of one core
for each run. `paper`: 25 million parameters, ten epochs of WikiText-2, for a GPU; the papers train 10^9 parameters and more."""


def _debate(
    name: str, title: str, *recipes: str, pairs: tuple[tuple[str, str], ...] = (), rates: tuple[float, ...] = ()
) -> None:
    DEBATES.append(
        TableRow(
            "debates",
            name,
            title,
            "test perplexity",
            {},
            "",
            ("fp32", *recipes),
            NETWORKS,
            higher_is_better=False,
            rates=rates,
            pairs=pairs,
            network="gpt",
        )
    )


_debate(
    "gemms",
    "Which product costs most when it alone is in 4 bits?",
    "mxfp4-ceil-fprop",
    "mxfp4-ceil-dgrad",
    "mxfp4-ceil-wgrad",
    "mxfp4-ceil",
    pairs=(
        ("mxfp4-ceil-fprop", "mxfp4-ceil-dgrad"),
        ("mxfp4-ceil-fprop", "mxfp4-ceil-wgrad"),
        ("mxfp4-ceil-dgrad", "mxfp4-ceil-wgrad"),
    ),
)
_debate(
    "rotations",
    "Random signs, fixed signs, no signs, no rotation; and of which product?",
    "mxfp4-ceil",
    "mxfp4-ceil-h32",
    "mxfp4-ceil-h32-signs",
    "mxfp4-ceil-rht",
    "mxfp4-ceil-rht-fprop",
    "mxfp4-ceil-rht-dgrad",
    "mxfp4-ceil-rht-wgrad",
    pairs=(
        *((f"mxfp4-ceil-{turned}", "mxfp4-ceil") for turned in ("h32", "h32-signs", "rht")),
        *((f"mxfp4-ceil-rht-{which}", "mxfp4-ceil") for which in ("fprop", "dgrad", "wgrad")),
        ("mxfp4-ceil-rht", "mxfp4-ceil-h32"),
    ),
)
_debate(
    "rounding",
    "Stochastic or to nearest, of which operands?",
    "mxfp4-ceil",
    "mxfp4-ceil-sr-g",
    "mxfp4-ceil-sr-g-dgrad",
    "mxfp4-ceil-sr-g-wgrad",
    "mxfp4-ceil-sr-backward",
    "mxfp4-ceil-sr-fprop",
    "mxfp4-ceil-sr",
    pairs=(
        *(
            (f"mxfp4-ceil-{which}", "mxfp4-ceil")
            for which in ("sr-g", "sr-g-dgrad", "sr-g-wgrad", "sr-backward", "sr-fprop", "sr")
        ),
        ("mxfp4-ceil-sr-g", "mxfp4-ceil-sr-backward"),
    ),
)
_debate(
    "end",
    "Which side returns to high precision at the end, and when?",
    "nvfp4-fqt",
    "nvfp4-fqt-forward-end",
    "nvfp4-fqt-backward-end",
    "nvfp4-fqt-backward-half",
    "nvfp4-fqt-high-end",
    pairs=(
        ("nvfp4-fqt-forward-end", "nvfp4-fqt"),
        ("nvfp4-fqt-backward-end", "nvfp4-fqt"),
        ("nvfp4-fqt-forward-end", "nvfp4-fqt-backward-end"),
        ("nvfp4-fqt-backward-half", "nvfp4-fqt-backward-end"),
    ),
)
_debate(
    "grid",
    "E2M1 or a uniform grid, with rotations and without?",
    "ufp4",
    "ufp4-plain",
    "ufp4-e2m1",
    "ufp4-e2m1-plain",
    pairs=(
        ("ufp4", "ufp4-e2m1"),
        ("ufp4-plain", "ufp4-e2m1-plain"),
        ("ufp4", "ufp4-plain"),
        ("ufp4-e2m1", "ufp4-e2m1-plain"),
    ),
)
_debate(
    "blocks",
    "Blocks of 16, 32 or 64, and which format for their scale?",
    "e2m1-block16-e8m0",
    "mxfp4-ceil-sr-g",
    "e2m1-block64-e8m0",
    "ufp4-e2m1-plain",
    "e2m1-block32-e4m3",
    "e2m1-block64-e4m3",
    "mxfp4",
    "mxfp4-ceil",
    pairs=(
        ("e2m1-block16-e8m0", "mxfp4-ceil-sr-g"),
        ("mxfp4-ceil-sr-g", "e2m1-block64-e8m0"),
        ("ufp4-e2m1-plain", "e2m1-block16-e8m0"),
        ("e2m1-block32-e4m3", "mxfp4-ceil-sr-g"),
        ("e2m1-block64-e4m3", "e2m1-block64-e8m0"),
        ("mxfp4-ceil", "mxfp4"),
    ),
)
_debate(
    "families",
    "Radix-4 FP4 with one scale per layer against block scales",
    "int4-fwd",
    "ibm2020",
    "ibm2020-luq",
    "luq",
    "fourbit",
    "mxfp4-ceil-sr-g",
    "mxfp4-rht-sr",
    "nvfp4-fqt",
    "nvfp4",
    "quartet",
    pairs=(
        ("ibm2020", "mxfp4-ceil-sr-g"),
        ("ibm2020-luq", "mxfp4-ceil-sr-g"),
        ("luq", "mxfp4-ceil-sr-g"),
        ("fourbit", "mxfp4-ceil-sr-g"),
        ("nvfp4-fqt", "mxfp4-ceil-sr-g"),
        ("ibm2020", "int4-fwd"),
    ),
)
_debate(
    "rows",
    "A scale for each layer, each row of an operand, or each block",
    "fourbit",
    "fourbit-rows",
    "mxfp4-ceil-sr-g",
    pairs=(("fourbit-rows", "fourbit"), ("fourbit-rows", "mxfp4-ceil-sr-g")),
)
_debate(
    "rates",
    "Half and double the learning rate",
    "ibm2020",
    "ibm2020-luq",
    "mxfp4-ceil",
    "mxfp4-ceil-sr-g",
    "nvfp4-fqt",
    "ufp4",
    rates=(0.001, 0.002, 0.004),
    pairs=(("ibm2020-luq", "ibm2020"), ("ibm2020-luq", "mxfp4-ceil-sr-g"), ("mxfp4-ceil-sr-g", "nvfp4-fqt")),
)
