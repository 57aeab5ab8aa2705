"""Dictionaries: sparse features of activations, learned, pursued or classical, on one contract."""

from .abs_topk import AbsTopK
from .archetypal import Archetypal
from .base import Batch, Dictionary, Objective
from .batch_topk import BatchTopK
from .cache import cached_source, write_cache
from .consciousness import ConsciousnessBottleneck
from .crate import CrateBlock
from .crosscoder import Crosscoder
from .dark_matter import dark_matter
from .fast import fast_source
from .feature_choice import FeatureChoice
from .files import load_dictionary, save_dictionary
from .foreign import read_dictionary_learning, read_sparsify
from .gated import Gated
from .gradient_topk import GradientTopK
from .itda import ITDA
from .judge import judge
from .jumprelu import JumpReLU
from .ksvd import KSVD
from .live import live_source
from .matching_pursuit import MatchingPursuit
from .matryoshka import matryoshka_sae
from .mutual_choice import MutualChoice
from .nmf import NMF
from .online_learning import OnlineLearning
from .relu import ReLU
from .sae import Rule, SparseAutoencoder
from .saelens import read_saelens, save_saelens
from .sources import ActivationSource, TensorSource
from .sparse_coding import SparseCoding
from .sparse_concept_coding import SparseConceptCoding
from .sparse_jepa import SparseJepa
from .tetrolets import Tetrolets
from .top_afa import TopAFA
from .topk import TopK
from .trainer import Trained, TrainOptions, train
from .transcoder import Transcoder
from .variational import Variational

__all__ = [
    "ITDA",
    "KSVD",
    "NMF",
    "AbsTopK",
    "ActivationSource",
    "Archetypal",
    "Batch",
    "BatchTopK",
    "ConsciousnessBottleneck",
    "CrateBlock",
    "Crosscoder",
    "Dictionary",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "JumpReLU",
    "MatchingPursuit",
    "MutualChoice",
    "Objective",
    "OnlineLearning",
    "ReLU",
    "Rule",
    "SparseAutoencoder",
    "SparseCoding",
    "SparseConceptCoding",
    "SparseJepa",
    "TensorSource",
    "Tetrolets",
    "TopAFA",
    "TopK",
    "TrainOptions",
    "Trained",
    "Transcoder",
    "Variational",
    "cached_source",
    "dark_matter",
    "fast_source",
    "judge",
    "live_source",
    "load_dictionary",
    "matryoshka_sae",
    "read_dictionary_learning",
    "read_saelens",
    "read_sparsify",
    "save_dictionary",
    "save_saelens",
    "train",
    "write_cache",
]
