"""The one table of claims, sorted: where each is, whose it is, and what it states."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A claim that can be run: its module here, the paper's arXiv number, and what is stated."""

    module: str
    paper: str
    statement: str


# fmt: off
CLAIMS: dict[str, Claim] = {
    "abstopk-bidirectional": Claim("abstopk_bidirectional", "2510.00404", "With signed codes one atom serves both directions of an axis, and AbsTopK reconstructs better than TopK does."),
    "anchor-higher-recall": Claim("anchor_higher_recall", "2505.23520", "At equal cost, stripes chosen by anchors keep more attention than blocks or vertical-slash lines do."),
    "attention-heads-polysemantic": Claim("attention_heads_polysemantic", "2406.17759", "At least nine of ten attention heads have several unrelated roles, by the features that they make."),
    "cfsp-beats-uniform": Claim("cfsp_beats_uniform", "2409.13199", "Sharing neurons out by how far blocks turn the hidden states keeps a model better than equal shares do."),
    "crate-sparsifies": Claim("crate_sparsifies", "2306.01129", "Layer by layer, CRATE compresses tokens and makes them sparser, trained by labels alone."),
    "dark-matter-linear": Claim("dark_matter_linear", "2410.14670", "About half of an autoencoder's error, and over 90 % of its squared norm, is linear in the activation."),
    "decode-sparser-than-prefill": Claim("decode_sparser_than_prefill", "2504.17768", "At equal quality, decoding bears a sparser reading of the cache than prefill does of the prompt."),
    "dhsa-beats-block-sparse": Claim("dhsa_beats_block_sparse", "2510.24606", "At equal density, DHSA keeps a language model and its retrieval better than block-sparse attention does."),
    "double-sparsity-1-16": Claim("double_sparsity_1_16", "2408.07092", "A sixteenth of the channels of each head finds a sixteenth of the tokens that keeps a model's quality."),
    "dsnot-recovers-at-70": Claim("dsnot_recovers_at_70", "2310.08915", "At 70 % DSnoT makes a mask of Wanda's better by swapping weights in and out, without changing any."),
    "dual-chunk-extrapolates": Claim("dual_chunk_extrapolates", "2402.17463", "Beyond the trained length, dual-chunk attention predicts text better than the model alone, without training."),
    "essential-sparsity-knee": Claim("essential_sparsity_knee", "2306.03805", "Removing the smallest weights at once costs little up to a point and far more beyond, unstructured and N:M."),
    "fast-beats-concatenation": Claim("fast_beats_concatenation", "2506.07691", "A dictionary trained conversation by conversation reconstructs conversations better than one of blocks does."),
    "gna-simulator": Claim("gna_simulator", "2504.16922", "The gain of neighbourhood attention follows a count of tiles, and many perfectly block-sparse cases reach it."),
    "gqsa-beats-2-4": Claim("gqsa_beats_2_4", "2412.17560", "Groups of 16 in 4 bits, half of them pruned, keep a model better than 2:4 and W2 do, and decode faster."),
    "group-channel-pruning": Claim("group_channel_pruning", "2306.01526", "With a threshold for each group of layers, two thirds of a detector's parameters go at little loss of "
        "precision, and at less than with one threshold for all."),
    "gsae-more-faithful": Claim("gsae_more_faithful", "2411.10397", "Codes of equal sparsity change a model's predictions less if the gradient of its loss helped to choose them."),
    "hip-beats-window": Claim("hip_beats_window", "2406.09827", "At equal cost HiP keeps retrieval and perplexity better than a window with sinks, and overlooks few tokens."),
    "hip-scaling": Claim("hip_scaling", "2406.09827", "HiP's selection takes time as T log T and its attention as T, where dense attention takes it as T squared."),
    "hyper-scaling": Claim("hyper_scaling", "2310.05869", "HyperAttention's time grows with a smaller exponent than exact attention's, with and without a causal mask."),
    "ioi-supervised-beats-sae-control": Claim("ioi_supervised_beats_sae_control", "2405.08366", "A dictionary that knows a task's attributes controls a model by edits better than a sparse autoencoder does; "
        "here on recall with the attributes of indirect object identification, which the embedded model cannot do."),
    "itda-model-similarity": Claim("itda_model_similarity", "2505.17769", "By the origins of its atoms, ITDA finds the corresponding layers of two models more often than CKA, SVCCA and "
        "relative representations do."),
    "itda-one-percent": Claim("itda_one_percent", "2505.17769", "ITDA takes 1 % of the time and of the data that an autoencoder's training does, and explains nearly as much."),
    "kick-vs-perplexity": Claim("kick_vs_perplexity", "2310.01382", "Pruning costs a model its knowledge before perplexity tells, and spares what it reads from its context."),
    "kinetics-attention-dominates": Claim("kinetics_attention_dominates", "2506.05333", "In test-time scaling reading keys and values costs more than the parameters do, most of all in small models."),
    "kinetics-model-within-20-percent": Claim("kinetics_model_within_20_percent", "2506.05333", "The cost model tells the seconds of decode steps and prefills on a measured machine to within 20 %."),
    "l0-beats-l1-on-natural-images": Claim("natural_images", "2301.10002", "At equal sparsity, penalties close to l0 reconstruct natural images far better than l1 does."),
    "lemo-memory": Claim("lemo_memory", "2501.09767", "Fine-tuning on long texts without the uninformative tokens takes much less memory, at a loss as good."),
    "longgen-hybrid": Claim("longgen_hybrid", "2410.01485", "With the middle third of the layers full, a model keeps more than with sparse layers alone at equal cost."),
    "lottery-rewind": Claim("lottery_rewind", "1912.05671", "Iterative pruning that rewinds to early in training finds subnetworks that train better than random masks and "
        "random weights of the same density."),
    "lottery-transfer-calibration": Claim("lottery_transfer_calibration", "2308.14969", "On other images, probed or prompted, dense models are always better calibrated than their lottery tickets, "
        "and tickets as good on the source do worse on some of them."),
    "lserve-constant-pages": Claim("lserve_constant_pages", "2502.14866", "A constant number of pages keeps retrieval accuracy while the context grows."),
    "minference-crossover": Claim("minference_crossover", "2407.02490", "Vertical-slash attention, selection included, is slower than dense attention on short prompts and faster on "
        "long ones."),
    "moa-beats-uniform": Claim("moa_beats_uniform", "2406.14909", "At equal density, spans of each head's own (MoA) keep retrieval and perplexity better than a uniform window."),
    "mp-monotone-error": Claim("mp_monotone_error", "2506.03093", "Every further step of MP-SAE lowers its error; TopK is worse beyond the entries of its training."),
    "mp-sae-hierarchical": Claim("mp_sae_hierarchical", "2506.03093", "MP-SAE finds the concepts of a hierarchy; l1 and BatchTopK encoders mix children with parents."),
    "mutual-feature-choice-fewer-dead": Claim("mutual_feature_choice_fewer_dead", "2411.02124", "Sharing entries over a batch, with aux_zipf_loss, leaves fewer features dead than TopK, at a lower error."),
    "no-single-best": Claim("no_single_best", "2504.17768", "No sparse attention method is best across tasks and phases."),
    "owl-at-70": Claim("owl_at_70", "2310.05175", "At 70 % layer ratios by the share of outliers (OWL) keep a language model better than uniform ones do."),
    "power-receptive-field": Claim("power_receptive_field", "2503.03588", "What PowerAttention reaches doubles with every layer; a window of equal cost reaches its own length farther."),
    "ppd-accepts-more": Claim("ppd_accepts_more", "2405.18628", "With trained prompt tokens, a dynamic sparse tree accepts more tokens a pass than other trees, losslessly."),
    "ra-sae-stability": Claim("ra_sae_stability", "2502.12892", "From other seeds RA-SAE finds nearly the same atoms and TopK does not; both reconstruct about equally well."),
    "retrieval-heads-causal": Claim("retrieval_heads_causal", "2404.15574", "Masking the retrieval heads destroys retrieval; masking as many other heads does not."),
    "retrieval-heads-sparse": Claim("retrieval_heads_sparse", "2404.15574", "Few heads, under 5 % of them, retrieve from a long context."),
    "scc-clusters": Claim("scc_clusters", "2004.01551", "Images cluster better by sparse concept codes than by pixels."),
    "sharded-union": Claim("sharded_union", "2407.17678", "Heads with different shards see the whole context together, and keep more than heads with one shard for all."),
    "sharedllm-extends-context": Claim("sharedllm_extends_context", "2410.19318", "Trained on short contexts, SharedLLM predicts after ones 16 times as long better than without them and than a "
        "streaming window of equal memory, at less time and memory than full attention."),
    "snapkv-beats-window": Claim("snapkv_beats_window", "2404.14469", "After a prompt was cut once, SnapKV has kept more of what is asked for than a recent window of equal size."),
    "sparse-convnet-frontier": Claim("sparse_convnet_frontier", "1911.09723", "A wide ConvNet with sparse 1x1 convolutions classifies better than a narrow dense one of equal FLOPs, and of "
        "equal measured time."),
    "sparse-jepa-probe": Claim("sparse_jepa_probe", "2504.16140", "With a group penalty on its latents, a JEPA's representation serves a linear classifier better."),
    "sparsegpt-at-2-4": Claim("sparsegpt_at_2_4", "2301.00774", "At 2:4 SparseGPT keeps a language model better than Wanda and magnitude do, and 2:4 costs more than 50 %."),
    "threads-harder-than-needles": Claim("threads_harder_than_needles", "2411.05000", "Following a thread through a long text is harder than finding a needle, and harder the longer the thread."),
    "tidal-close-to-full": Claim("tidal_close_to_full", "2410.05076", "With a small budget of tokens TidalDecode stays close to full attention, and no further from it than Quest."),
    "top-afa-no-k": Claim("top_afa_no_k", "2503.24277", "Without a k to set, top-AFA reconstructs about as well as TopK with the k that it arrives at."),
    "vsae-more-dead": Claim("vsae_more_dead", "2509.22994", "Codes that are sampled and drawn towards a normal leave more features dead than TopK, at a higher error."),
    "wanda-beats-magnitude": Claim("wanda_beats_magnitude", "2306.11695", "At 50 % unstructured sparsity, without retraining, Wanda keeps a language model better than magnitude does."),
    "wina-beats-teal": Claim("wina_beats_teal", "2505.19427", "At equal sparsity, ranking inputs by |x|·‖W column‖ (WINA) keeps more quality than by |x| alone (TEAL)."),
}
# fmt: on
