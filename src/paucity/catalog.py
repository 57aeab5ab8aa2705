"""The one table of methods: an explicit dict, one sorted line each. Importing it imports no method.

It feeds the command line's choices, the error texts, the docs and the tests that run over every method.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .checks import InputError, check_choice, fail


@dataclass(frozen=True)
class Method:
    """One published method.

    Args:
        target: ``module:attribute`` inside ``package``, what a Python user calls.
        family: the subpackage of the method, whose ``apply`` module installs it.
        paper: arXiv number.
        title: title of the paper.
        ops: names of the shared operators and kernels that it stands on.
        claims: names of the reproduced claims.
        package: the package that holds all this; a plug-in names its own.
        step: whether a recipe can use it as a step; one that cannot is called from Python.
    """

    target: str
    family: str
    paper: str
    title: str
    ops: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    package: str = "paucity"
    step: bool = True

    def load(self) -> Any:
        """The object at `target`, imported now."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(f"{self.package}.{module}"), attribute)

    def installer(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """``(options_for, apply_step)`` of the family's ``apply`` module, imported now.

        Raises:
            InputError: if the method is no step of a recipe.
        """
        if not self.step:
            raise fail(
                "recipe", "method", "be one that a recipe can use", f"{self.target}, which is called from Python"
            )
        module = importlib.import_module(f"{self.package}.{self.family}.apply")
        return module.options_for, module.apply_step


# fmt: off
METHODS: dict[str, Method] = {
    "abs_topk_sae": Method("dictionary.abs_topk:AbsTopK", family="dictionary", paper="2510.00404", title="AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features", ops=("topk", "encode_kept", "decode_codes"), claims=("abstopk-bidirectional",), step=False),
    "ada_kv": Method("attention.eviction.ada_kv:AdaKV", family="attention", paper="2407.11550", title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", ops=("decode_attention",)),
    "anchor": Method("attention.anchor:Anchor", family="attention", paper="2505.23520", title="AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity", ops=("pool_blocks", "grouped_products", "sparse_attention"), claims=("anchor-higher-recall",)),
    "archetypal_sae": Method("dictionary.archetypal:Archetypal", family="dictionary", paper="2502.12892", title="Archetypal SAE: Adaptive and Stable Dictionary Learning for Concept Extraction in Large Vision Models", ops=("topk", "encode_kept", "decode_codes"), claims=("ra-sae-stability",), step=False),
    "batch_topk_sae": Method("dictionary.batch_topk:BatchTopK", family="dictionary", paper="2412.06410", title="BatchTopK Sparse Autoencoders", ops=("topk", "global_topk_mask", "threshold_select", "encode_kept", "decode_codes"), step=False),
    "block_sparse": Method("attention.block_sparse:BlockSparse", family="attention", paper="2205.14135", title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", ops=("text_mask", "sparse_attention")),
    "block_topk": Method("attention.block_topk:BlockTopK", family="attention", paper="2407.02490", title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", ops=("pool_blocks", "grouped_products", "topk_mask", "sparse_attention"), claims=("decode-sparser-than-prefill", "no-single-best")),
    "block_topk_decode": Method("attention.decode.block_topk:BlockTopKDecode", family="attention", paper="2506.05333", title="Kinetics: Rethinking Test-Time Scaling Laws", ops=("decode_attention",), claims=("decode-sparser-than-prefill", "kinetics-attention-dominates", "kinetics-model-within-20-percent")),
    "cats": Method("activations.cats:cats_mask", family="activations", paper="2404.08763", title="CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models", ops=("threshold_mask",)),
    "cfsp": Method("weights.structured.cfsp:cfsp_score", family="weights", paper="2409.13199", title="CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information", ops=("by_importance", "topk_mask"), claims=("cfsp-beats-uniform",)),
    "channels": Method("weights.structured.channels:choose_channels", family="weights", paper="2301.12900", title="DepGraph: Towards Any Structural Pruning", ops=("topk_mask", "global_topk_masks", "erk")),
    "chunked_hierarchical": Method("attention.chunked_hierarchical:ChunkedHierarchical", family="attention", paper="2510.24606", title="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs", ops=("pool_blocks", "grouped_products", "topk_mask", "sparse_attention"), claims=("dhsa-beats-block-sparse",)),
    "consciousness": Method("dictionary.consciousness:ConsciousnessBottleneck", family="dictionary", paper="1709.08568", title="The Consciousness Prior", ops=("gumbel_topk", "topk"), step=False),
    "crate": Method("dictionary.crate:CrateBlock", family="dictionary", paper="2306.01129", title="White-Box Transformers via Sparse Rate Reduction", claims=("crate-sparsifies",), step=False),
    "crosscoder": Method("dictionary.crosscoder:Crosscoder", family="dictionary", paper="transformer-circuits.pub/2024/crosscoders", title="Sparse Crosscoders for Cross-Layer Features and Model Diffing", ops=("threshold_select", "encode_kept", "decode_codes"), step=False),
    "dark_matter": Method("dictionary.dark_matter:dark_matter", family="dictionary", paper="2410.14670", title="Decomposing The Dark Matter of Sparse Autoencoders", claims=("dark-matter-linear",), step=False),
    "double_sparsity": Method("attention.double_sparsity:DoubleSparsity", family="attention", paper="2408.07092", title="Post-Training Sparse Attention with Double Sparsity", ops=("topk_indices", "decode_attention"), claims=("double-sparsity-1-16",)),
    "double_sparsity_channels": Method("attention.decode.double_sparsity_channels:DoubleSparsityChannels", family="attention", paper="2408.07092", title="Post-Training Sparse Attention with Double Sparsity", ops=("decode_attention",)),
    "dsnot": Method("weights.dsnot:dsnot_mask", family="weights", paper="2310.08915", title="Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ops=("topk_mask", "nm_mask"), claims=("dsnot-recovers-at-70",)),
    "dual_chunk": Method("attention.dual_chunk:DualChunk", family="attention", paper="2501.15383", title="Qwen2.5-1M Technical Report", ops=("topk_indices", "sparse_attention", "merge_attention"), claims=("dual-chunk-extrapolates",)),
    "essential_sparsity": Method("weights.essential:essential_sparsity", family="weights", paper="2306.03805", title="The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter", ops=("global_topk_masks", "nm_mask", "knee", "last_above"), claims=("essential-sparsity-knee",), step=False),
    "expected_attention": Method("attention.eviction.expected_attention:ExpectedAttention", family="attention", paper="2510.00636", title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", ops=("decode_attention",)),
    "fast": Method("dictionary.fast:fast_source", family="dictionary", paper="2506.07691", title="Training Superior Sparse Autoencoders for Instruct Models", claims=("fast-beats-concatenation",), step=False),
    "feature_choice_sae": Method("dictionary.feature_choice:FeatureChoice", family="dictionary", paper="2411.02124", title="Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders", ops=("topk", "threshold_select", "encode_kept", "decode_codes"), claims=("mutual-feature-choice-fewer-dead",), step=False),
    "flash": Method("attention.flash:Flash", family="attention", paper="2205.14135", title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", ops=("sparse_attention",)),
    "flexprefill": Method("attention.flexprefill:FlexPrefill", family="attention", paper="2502.20766", title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference", ops=("pool_blocks", "grouped_products", "cover_mask", "topk_mask", "sparse_attention")),
    "gated_sae": Method("dictionary.gated:Gated", family="dictionary", paper="2404.16014", title="Improving Dictionary Learning with Gated Sparse Autoencoders", ops=("threshold_select", "encode_kept", "decode_codes"), step=False),
    "gqsa": Method("weights.gqsa:gqsa", family="weights", paper="2412.17560", title="GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference", ops=("block_topk_mask", "packed_linear"), claims=("gqsa-beats-2-4",)),
    "gradient_sae": Method("dictionary.gradient_topk:GradientTopK", family="dictionary", paper="2411.10397", title="Features that Make a Difference: Leveraging Gradients for Improved Dictionary Learning", ops=("topk", "encode_kept", "decode_codes"), claims=("gsae-more-faithful",), step=False),
    "gradual": Method("weights.gradual:train_sparse", family="weights", paper="1710.01878", title="To prune, or not to prune: exploring the efficacy of pruning for model compression", ops=("Cubic", "topk_mask"), claims=("sparse-convnet-frontier",)),
    "grid": Method("attention.grid:Grid", family="attention", paper="2504.16083", title="MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware Permutation Sparse Attention", ops=("grouped_products", "topk_mask", "sparse_attention")),
    "group_channel": Method("weights.group_channel:group_channel_prune", family="weights", paper="2306.01526", title="Group channel pruning and spatial attention distilling for object detection", ops=("global_topk_masks", "greedy"), claims=("group-channel-pruning",), step=False),
    "h2o": Method("attention.eviction.h2o:H2o", family="attention", paper="2306.14048", title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", ops=("line_mass", "soft_capped", "decode_attention")),
    "head_attribution": Method("dictionary.head_attribution:head_weights", family="dictionary", paper="2406.17759", title="Interpreting Attention Layer Outputs with Sparse Autoencoders", claims=("attention-heads-polysemantic",), step=False),
    "heads": Method("weights.structured.scores:taylor_unit_scores", family="weights", paper="1905.10650", title="Are Sixteen Heads Really Better than One?", ops=("topk_mask",)),
    "hierarchical": Method("attention.hierarchical:Hierarchical", family="attention", paper="2406.09827", title="A Training-Free Sub-Quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention", ops=("tree_select", "sparse_attention"), claims=("hip-beats-window", "hip-scaling")),
    "hierarchical_decode": Method("attention.decode.hierarchical_decode:HierarchicalDecode", family="attention", paper="2406.09827", title="A Training-Free Sub-Quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention", ops=("tree_select", "decode_attention")),
    "hyper": Method("attention.hyper:Hyper", family="attention", paper="2310.05869", title="HyperAttention: Long-context Attention in Near-Linear Time", ops=("hyperplane_codes", "gray_rank", "sparse_attention", "merge_attention"), claims=("hyper-scaling",)),
    "itda": Method("dictionary.itda:ITDA", family="dictionary", paper="2505.17769", title="Inference-Time Decomposition of Activations (ITDA): A Scalable Approach to Interpreting Large Language Models", ops=("matching_pursuit", "decode_codes"), claims=("itda-model-similarity", "itda-one-percent"), step=False),
    "iterative_magnitude": Method("weights.iterative:iterative_magnitude", family="weights", paper="1912.05671", title="Linear Mode Connectivity and the Lottery Ticket Hypothesis", ops=("global_topk_mask", "global_topk_masks"), claims=("lottery-rewind",), step=False),
    "jumprelu_sae": Method("dictionary.jumprelu:JumpReLU", family="dictionary", paper="2407.14435", title="Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders", ops=("threshold_select", "encode_kept", "decode_codes"), step=False),
    "kernel_groups": Method("weights.kernel_groups:kernel_group_mask", family="weights", paper="2310.19509", title="SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on Fine-Grained Group Sparsity", ops=("block_topk_mask",)),
    "knorm": Method("attention.eviction.knorm:Knorm", family="attention", paper="2406.11430", title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", ops=("decode_attention",)),
    "ksvd": Method("dictionary.ksvd:KSVD", family="dictionary", paper="10.1109/TSP.2006.881199", title="K-SVD: An Algorithm for Designing Overcomplete Dictionaries for Sparse Representation", ops=("orthogonal_matching_pursuit", "decode_codes"), step=False),
    "layers": Method("weights.structured.influence:block_influence", family="weights", paper="2403.03853", title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", ops=("topk_mask",)),
    "lemo": Method("attention.lemo:LeMo", family="attention", paper="2501.09767", title="LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning", ops=("block_informativeness", "activation_informativeness", "keep_blocks", "subset", "segment_loss"), claims=("lemo-memory",), step=False),
    "longgen": Method("attention.longgen:LongGen", family="attention", paper="2410.01485", title="A Little Goes a Long Way: Efficient Long Context Training and Inference with Partial Contexts", ops=("num_kept", "sparse_attention"), claims=("longgen-hybrid",)),
    "lottery_transfer": Method("weights.transfer:VisualPrompt", family="weights", paper="2308.14969", title="Reprogramming under constraints: Revisiting efficient and reliable transferability of lottery tickets", claims=("lottery-transfer-calibration",), step=False),
    "lserve": Method("attention.lserve:LServe", family="attention", paper="2502.14866", title="LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention", ops=("sparse_attention", "decode_attention"), claims=("lserve-constant-pages",)),
    "magnitude": Method("weights.magnitude:magnitude_mask", family="weights", paper="1506.02626", title="Learning both Weights and Connections for Efficient Neural Networks", ops=("topk_mask", "global_topk_mask", "nm_mask"), claims=("wanda-beats-magnitude",)),
    "matryoshka_sae": Method("dictionary.matryoshka:matryoshka_sae", family="dictionary", paper="2503.17547", title="Learning Multi-Level Features with Matryoshka Sparse Autoencoders", ops=("topk", "global_topk_mask", "threshold_select", "encode_kept", "decode_codes"), step=False),
    "minference": Method("attention.minference:MInference", family="attention", paper="2407.02490", title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", ops=("line_lists", "sparse_attention")),
    "moa": Method("attention.moa:MoA", family="attention", paper="2406.14909", title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression", ops=("drop_influence", "window_influence", "pareto_options", "sparse_attention"), claims=("moa-beats-uniform",)),
    "mp_sae": Method("dictionary.matching_pursuit:MatchingPursuit", family="dictionary", paper="2506.03093", title="From Flat to Hierarchical: Extracting Sparse Representations with Matching Pursuit", ops=("matching_pursuit", "decode_codes"), claims=("mp-monotone-error", "mp-sae-hierarchical"), step=False),
    "mutual_choice_sae": Method("dictionary.mutual_choice:MutualChoice", family="dictionary", paper="2411.02124", title="Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders", ops=("topk", "threshold_select", "encode_kept", "decode_codes"), claims=("mutual-feature-choice-fewer-dead",), step=False),
    "neighbourhood": Method("attention.neighbourhood:Neighbourhood", family="attention", paper="2504.16922", title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light", ops=("neighbourhood_mask", "simulate_speedup", "sparse_attention"), claims=("gna-simulator",)),
    "neurons": Method("weights.structured.scores:activation_unit_score", family="weights", paper="2312.11983", title="Fluctuation-based Adaptive Structured Pruning for Large Language Models", ops=("topk_mask", "by_importance", "owl")),
    "nmf": Method("dictionary.nmf:NMF", family="dictionary", paper="1010.1763", title="Algorithms for Nonnegative Matrix Factorization with the Beta-Divergence", ops=("decode_codes",), step=False),
    "online_learning": Method("dictionary.online_learning:OnlineLearning", family="dictionary", paper="0908.0050", title="Online Learning for Matrix Factorization and Sparse Coding", ops=("decode_codes",), step=False),
    "oracle_topk": Method("attention.decode.oracle:OracleTopK", family="attention", paper="2506.05333", title="Kinetics: Rethinking Test-Time Scaling Laws", ops=("soft_capped", "decode_attention"), claims=("threads-harder-than-needles",)),
    "packed": Method("weights.packed:pack", family="weights", paper="2104.08378", title="Accelerating Sparse Deep Neural Networks", ops=("packed_linear", "nm_pattern", "smallest")),
    "paged_selection": Method("attention.decode.paged_selection:PagedSelection", family="attention", paper="2502.14866", title="LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention", ops=("decode_attention",), claims=("lserve-constant-pages",)),
    "per_head": Method("attention.per_head:PerHead", family="attention", paper="2407.02490", title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", ops=("sparse_attention",)),
    "power": Method("attention.power:Power", family="attention", paper="2503.03588", title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention", ops=("is_power_of_two", "text_mask", "sparse_attention"), claims=("power-receptive-field",)),
    "ppd": Method("attention.speculation.ppd:prompt_decode", family="attention", paper="2405.18628", title="Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference", ops=("sparse_attention",), claims=("ppd-accepts-more",), step=False),
    "pyramidkv": Method("attention.eviction.pyramidkv:PyramidKV", family="attention", paper="2406.02069", title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", ops=("soft_capped", "decode_attention")),
    "quantised": Method("attention.eviction.quantised:Quantised", family="attention", paper="2402.02750", title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ops=("quantise", "dequantise", "decode_attention", "merge_attention")),
    "quest": Method("attention.decode.quest:Quest", family="attention", paper="2406.10774", title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ops=("decode_attention",), claims=("decode-sparser-than-prefill", "no-single-best")),
    "random": Method("weights.random:random_score", family="weights", paper="2202.02643", title="The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training", ops=("topk_mask", "global_topk_mask", "nm_mask")),
    "refined_budgets": Method("attention.refine:RefinedBudgets", family="attention", paper="2501.15383", title="Qwen2.5-1M Technical Report", ops=("topk_indices", "sparse_attention", "merge_attention")),
    "relu_sae": Method("dictionary.relu:ReLU", family="dictionary", paper="2309.08600", title="Sparse Autoencoders Find Highly Interpretable Features in Language Models", ops=("threshold_select", "encode_kept", "decode_codes"), step=False),
    "retrieval_heads": Method("attention.retrieval_heads:RetrievalHeads", family="attention", paper="2404.15574", title="Retrieval Head Mechanistically Explains Long-Context Factuality", ops=("decode_attention",), claims=("retrieval-heads-causal", "retrieval-heads-sparse")),
    "self_speculation": Method("attention.speculation.speculate:speculate", family="attention", paper="2408.11049", title="MagicDec: Breaking the Latency-Throughput Tradeoff for Long Context Generation with Speculative Decoding", ops=("decode_attention",), step=False),
    "sharded": Method("attention.sharded:Sharded", family="attention", paper="2407.17678", title="S2-Attention: Hardware-Aware Context Sharding Among Attention Heads", ops=("is_strided", "text_mask", "sparse_attention"), claims=("sharded-union",)),
    "shared_llm": Method("attention.shared_llm:SharedLLM", family="attention", paper="2410.19318", title="Two are better than one: Context window extension with multi-grained self-injection", claims=("sharedllm-extends-context",), step=False),
    "sink_window": Method("attention.sink_window:SinkWindow", family="attention", paper="2309.17453", title="Efficient Streaming Language Models with Attention Sinks", ops=("sparse_attention",)),
    "snapkv": Method("attention.eviction.snapkv:SnapKV", family="attention", paper="2404.14469", title="SnapKV: LLM Knows What You are Looking for Before Generation", ops=("soft_capped", "decode_attention"), claims=("decode-sparser-than-prefill", "no-single-best", "snapkv-beats-window")),
    "spans": Method("attention.spans:Spans", family="attention", paper="2406.14909", title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression", ops=("sparse_attention",)),
    "sparse_coding": Method("dictionary.sparse_coding:SparseCoding", family="dictionary", paper="2301.10002", title="Beyond l1 sparse coding in V1", ops=("proximal_codes", "orthogonal_matching_pursuit", "decode_codes"), claims=("l0-beats-l1-on-natural-images",), step=False),
    "sparse_concept_coding": Method("dictionary.sparse_concept_coding:SparseConceptCoding", family="dictionary", paper="2004.01551", title="Sparse Concept Coded Tetrolet Transform for Unconstrained Odia Character Recognition", ops=("decode_codes",), claims=("scc-clusters",), step=False),
    "sparse_conv": Method("weights.sparse_conv:sparsify_convs", family="weights", paper="1911.09723", title="Fast Sparse ConvNets", ops=("sparse_conv1x1", "PackedCSR"), claims=("sparse-convnet-frontier",), step=False),
    "sparse_jepa": Method("dictionary.sparse_jepa:SparseJepa", family="dictionary", paper="2504.16140", title="SparseJEPA: Sparse Representation Learning of Joint Embedding Predictive Architectures", claims=("sparse-jepa-probe",), step=False),
    "sparsegpt": Method("weights.sparsegpt:sparsegpt_sweep", family="weights", paper="2301.00774", title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ops=("global_topk_mask", "nm_mask", "block_topk_mask"), claims=("owl-at-70", "sparsegpt-at-2-4",)),
    "streaming_decode": Method("attention.decode.streaming:StreamingDecode", family="attention", paper="2309.17453", title="Efficient Streaming Language Models with Attention Sinks", ops=("decode_attention",), claims=("no-single-best",)),
    "streaming_heads": Method("attention.decode.streaming_heads:StreamingHeads", family="attention", paper="2404.15574", title="Retrieval Head Mechanistically Explains Long-Context Factuality", ops=("decode_attention",)),
    "streaming_llm": Method("attention.eviction.streaming_llm:StreamingLLM", family="attention", paper="2309.17453", title="Efficient Streaming Language Models with Attention Sinks", ops=("decode_attention", "merge_attention"), claims=("snapkv-beats-window",)),
    "supervised_dictionary": Method("dictionary.ioi:supervised", family="dictionary", paper="2405.08366", title="Towards Principled Evaluations of Sparse Autoencoders for Interpretability and Control", claims=("ioi-supervised-beats-sae-control",), step=False),
    "taylor": Method("weights.taylor:taylor_score", family="weights", paper="1906.10771", title="Importance Estimation for Neural Network Pruning", ops=("topk_mask", "global_topk_mask", "nm_mask")),
    "teal": Method("activations.teal:teal_mask", family="activations", paper="2408.14690", title="Training-Free Activation Sparsity in Large Language Models", ops=("threshold_mask", "topk_mask", "greedy"), claims=("wina-beats-teal",)),
    "tetrolets": Method("dictionary.tetrolets:Tetrolets", family="dictionary", paper="2004.01551", title="Sparse Concept Coded Tetrolet Transform for Unconstrained Odia Character Recognition", ops=("decode_codes",), step=False),
    "tidal": Method("attention.decode.tidal:Tidal", family="attention", paper="2410.05076", title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention", ops=("soft_capped", "decode_attention"), claims=("tidal-close-to-full",)),
    "top_afa_sae": Method("dictionary.top_afa:TopAFA", family="dictionary", paper="2503.24277", title="Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality", ops=("encode_kept", "decode_codes"), claims=("top-afa-no-k",), step=False),
    "top_p": Method("attention.decode.top_p:TopP", family="attention", paper="2502.02770", title="Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning", ops=("soft_capped", "top_p_mask", "decode_attention")),
    "topk_sae": Method("dictionary.topk:TopK", family="dictionary", paper="2406.04093", title="Scaling and evaluating sparse autoencoders", ops=("topk", "encode_kept", "decode_codes")),
    "tova": Method("attention.eviction.tova:Tova", family="attention", paper="2401.06104", title="Transformers are Multi-State RNNs", ops=("soft_capped", "decode_attention")),
    "transcoder": Method("dictionary.transcoder:Transcoder", family="dictionary", paper="2406.11944", title="Transcoders Find Interpretable LLM Feature Circuits", ops=("threshold_select", "encode_kept", "decode_codes"), step=False),
    "tri_shape": Method("attention.tri_shape:TriShape", family="attention", paper="2412.10319", title="SCBench: A KV Cache-Centric Analysis of Long-Context Methods", ops=("visible_blocks", "sparse_attention")),
    "variational_sae": Method("dictionary.variational:Variational", family="dictionary", paper="2509.22994", title="Analysis of Variational Sparse Autoencoders", ops=("topk", "encode_kept", "decode_codes"), claims=("vsae-more-dead",), step=False),
    "vertical_slash": Method("attention.vertical_slash:VerticalSlash", family="attention", paper="2407.02490", title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", ops=("topk_mask", "line_lists", "sparse_attention"), claims=("minference-crossover",)),
    "wanda": Method("weights.wanda:wanda_mask", family="weights", paper="2306.11695", title="A Simple and Effective Pruning Approach for Large Language Models", ops=("topk_mask", "global_topk_mask", "nm_mask"), claims=("kick-vs-perplexity", "owl-at-70", "wanda-beats-magnitude")),
    "wina": Method("activations.wina:wina_mask", family="activations", paper="2505.19427", title="WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", ops=("topk_mask", "threshold_mask", "greedy"), claims=("wina-beats-teal",)),
    "xattention": Method("attention.xattention:XAttention", family="attention", paper="2503.16428", title="XAttention: Block Sparse Attention with Antidiagonal Scoring", ops=("pool_blocks", "grouped_products", "cover_mask", "sparse_attention")),
}
# fmt: on


def get(name: str) -> Method:
    """The method called ``name``.

    Raises:
        InputError: if there is none; the message lists the choices and the nearest.
    """
    check_choice("catalog", "method", name, METHODS)
    return METHODS[name]


def families() -> tuple[str, ...]:
    """The families that have at least one method, sorted."""
    return tuple(sorted({method.family for method in METHODS.values()}))


def register(name: str, method: Method) -> None:
    """Add a method from outside the package.

    Raises:
        InputError: if the name is taken.
    """
    if name in METHODS:
        raise InputError(f"register: name must be new, got {name}.")
    METHODS[name] = method


def as_rows(family: str | None = None) -> list[dict[str, Any]]:
    """The table as plain dicts ``{name, family, paper, title, operators, claims}``, of one family or of all."""
    if family is not None:
        check_choice("catalog", "family", family, families())
    return [
        {
            "name": name,
            "family": method.family,
            "paper": method.paper,
            "title": method.title,
            "operators": list(method.ops),
            "claims": list(method.claims),
        }
        for name, method in sorted(METHODS.items())
        if family in (None, method.family)
    ]
