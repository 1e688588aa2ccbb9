"""Configuration of a selection-attention model: the keys of Llama and the keys of the block `gd`."""

from transformers import PretrainedConfig

# The keys that modeling_gd.py supports. The keys of the gradient estimator only affect training.
GD_KEYS = {"mechanism", "windows", "qk_norm", "output_bias", "output_gate", "beacon", "select", "selecting_heads",
           "induction_heads"}
SELECT_KEYS = {
    "candidates", "score", "norm_prior", "tie", "gate", "estimator", "temperature", "threshold", "rounds", "coherence",
    "preserve_floor", "value_floor", "exclude_below", "gradient", "picks", "threshold_by_length",
}
BEACON_KEYS = {"conv_width", "averages", "prior", "protected", "barrier"}
CHOICES = {
    "score": {"energy", "dot"},
    "tie": {"first", "last"},
    "estimator": {"candidates", "winner", "dense", "reinmax", "blend"},
    "coherence": {"global", "passage"},
}


def check_supported(keys, supported, where):
    """Raises a ValueError for the first key that is not supported."""
    for key in keys:
        if key not in supported:
            raise ValueError(f"{where}.{key} is not implemented in modeling_gd.py")


class GdConfig(PretrainedConfig):
    """The keys and defaults of `config.json` as the Rust implementation writes it."""

    model_type = "gd"

    def __init__(
        self,
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters=None,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        tie_word_embeddings=False,
        gd=None,
        **kwargs,
    ):
        gd = gd or {"mechanism": ["gd"]}
        select, beacon = gd.get("select") or {}, gd.get("beacon") or {}
        check_supported(gd, GD_KEYS, "gd")
        check_supported(select, SELECT_KEYS, "gd.select")
        check_supported(beacon, BEACON_KEYS, "gd.beacon")
        mechanisms = [m if isinstance(m, str) else m["name"] for m in gd["mechanism"]]
        check_supported(mechanisms, {"gd", "softmax"}, "gd.mechanism")
        for key, choices in CHOICES.items():
            check_supported([select[key]] if key in select else [], choices, f"gd.select.{key}")
        check_supported([hidden_act], {"silu"}, "hidden_act")
        rope_parameters = rope_parameters or {"rope_type": "default"}
        rope_parameters.setdefault("rope_theta", kwargs.get("rope_theta", 10000.0))
        check_supported([rope_parameters.get("rope_type", "default")], {"default", "linear", "llama3"}, "rope_type")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.hidden_act = hidden_act
        self.gd = gd
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
