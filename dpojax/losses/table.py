"""The table of objectives: what each is called, is given, needs and assumes.

Adding a loss is one function, one row here and one by-hand test. `make_loss` in
`dpojax.losses.make` binds settings and mixes them.
"""

from dpojax.losses import (
    anchored,
    batchwise,
    judged,
    likelihood,
    modifiers,
    pairs,
    ranked,
    reference_free,
    reward_model,
    token_level,
)
from dpojax.losses.objective import Mixture, Need, Objective, Running

_NONE: tuple[Need, ...] = ()

# p = log pi, d = p - log pi_ref, n = length, r = beta d, h = r_w - r_l, w chosen, l
# rejected, s = sigmoid, ls = log s. Learning rates are the papers', or TRL's.
OBJECTIVES: dict[str, Objective] = {
    # -- Pairs: the difference of two rewards -----------------------------------------
    "dpo": Objective(
        pairs.dpo,
        "-(1-e) ls(h) - e ls(-h)",
        "Rafailov et al. 2023, eq. 7; Mitchell 2023, eq. 3",
        cancels=True,
    ),
    "robust_dpo": Objective(
        pairs.robust_dpo,
        "(-(1-e) ls(h) + e ls(-h)) / (1-2e)",
        "Chowdhury et al. 2024, arXiv:2403.00409",
        cancels=True,
    ),
    "ipo": Objective(
        pairs.ipo,
        "(d_w/n_w - d_l/n_l - 1/(2 beta))²",
        "Azar et al. 2023, arXiv:2310.12036",
        averages=True,
        cancels=True,
    ),
    "hinge": Objective(
        pairs.hinge,
        "max(0, 1 - h)",
        "Liu et al. 2023, arXiv:2309.06657",
        cancels=True,
    ),
    "exo_pair": Objective(
        pairs.exo_pair,
        "KL((s(h), s(-h)) ‖ (1-e, e))",
        "Ji et al. 2024, arXiv:2402.00856",
        cancels=True,
    ),
    "discopop": Objective(
        pairs.discopop,
        "-(1-m) ls(h) + m exp(-h), m = s(h/tau)",
        "Lu et al. 2024, arXiv:2406.08414",
        learning_rate=5e-7,
        cancels=True,
    ),
    "dpo_norm": Objective(
        pairs.dpo_norm,
        "-ls(beta (d_w/n_w - d_l/n_l))",
        "Lambert et al. 2024, arXiv:2411.15124",
        learning_rate=5e-7,
        averages=True,
        cancels=True,
    ),
    "f_dpo": Objective(
        modifiers.f_dpo,
        "-ls(beta f'(u_w) - beta f'(u_l)), u = pi/pi_ref",
        "Wang et al. 2023, arXiv:2309.16240",
    ),
    "r_dpo": Objective(
        pairs.r_dpo,
        "-ls(h + alpha (n_w - n_l))",
        "Park et al. 2024, arXiv:2403.19159",
        learning_rate=5e-7,
        cancels=True,
    ),
    "ld_dpo": Objective(
        modifiers.ld_dpo,
        "DPO of p(first min n) + ld_alpha p(rest)",
        "Liu et al. 2024, arXiv:2409.06411",
        needs=("reference", "prefix"),
        learning_rate=5e-7,
    ),
    "wpo": Objective(
        modifiers.wpo,
        "-w_w w_l ls(h)",
        "Zhou et al. 2024, arXiv:2406.11827",
        needs=("reference", "log_sum_squares"),
        learning_rate=5e-7,
    ),
    "odpo": Objective(
        pairs.odpo,
        "-ls(h - alpha log(score_w - score_l))",
        "Amini et al. 2024, arXiv:2402.10571",
        needs=("reference", "score"),
        cancels=True,
    ),
    "dpop": Objective(
        pairs.dpop,
        "-ls(h - beta penalty max(0, -d_w))",
        "Pal et al. 2024, arXiv:2402.13228",
    ),
    "tdpo1": Objective(
        token_level.tdpo1,
        "-ls(h - beta (K_l - K_w)), K = token KL(ref‖pi)",
        "Zeng et al. 2024, arXiv:2404.11999",
        needs=("reference", "token_kl"),
    ),
    "tdpo2": Objective(
        token_level.tdpo2,
        "-ls(h - beta alpha (K_l - sg(K_w)))",
        "Zeng et al. 2024, arXiv:2404.11999",
        needs=("reference", "token_kl"),
    ),
    "step_dpo": Objective(
        pairs.step_dpo,
        "-ls(h), of one step of reasoning",
        "Lai et al. 2024, arXiv:2406.18629",
        learning_rate=5e-7,
        cancels=True,
    ),
    # -- Pairs: each reward has its place ---------------------------------------------
    "nca_pair": Objective(
        anchored.nca_pair,
        "-ls(r_w) - ls(-r_w)/2 - ls(-r_l)/2",
        "Chen et al. 2024, arXiv:2402.05369",
        learning_rate=5e-6,
    ),
    "bco_pair": Objective(
        anchored.bco_pair,
        "-ls(r_w) - ls(-r_l)",
        "Jung et al. 2024, arXiv:2404.04656",
        learning_rate=5e-7,
    ),
    "sppo_hard": Objective(
        anchored.sppo_hard,
        "(d_w - 1/(2 beta))² + (d_l + 1/(2 beta))²",
        "Wu et al. 2024, arXiv:2405.00675",
        learning_rate=5e-7,
    ),
    "apo_zero": Objective(
        anchored.apo_zero,
        "1 - s(r_w) + s(r_l)",
        "D'Oosterlinck et al. 2024, arXiv:2408.06266",
        learning_rate=2e-7,
    ),
    "apo_down": Objective(
        anchored.apo_down,
        "s(r_w) + 1 - s(h)",
        "D'Oosterlinck et al. 2024, arXiv:2408.06266",
        learning_rate=2e-7,
    ),
    "cal_dpo": Objective(
        anchored.cal_dpo,
        "-ls(d_w - d_l) + ((d_w - 1/(2 beta))² + (d_l + 1/(2 beta))²)/2",
        "Xiao et al. 2024, arXiv:2412.14516",
        learning_rate=5e-7,
    ),
    # -- Pairs: the whole batch -------------------------------------------------------
    "aot": Objective(
        batchwise.aot,
        "-(1-e) ls(beta x) - e ls(-beta x), x = sort(p_w - p_l) - sort(ref)",
        "Melnyk et al. 2024, arXiv:2406.05882",
        batchwise=True,
    ),
    "aot_unpaired": Objective(
        batchwise.aot_unpaired,
        "the same, x = sort(d_w) - sort(d_l)",
        "Melnyk et al. 2024, arXiv:2406.05882",
        batchwise=True,
    ),
    "beta_dpo": Objective(
        batchwise.beta_dpo,
        "-ls(beta_b (d_w - d_l)), beta_b = beta (1 + alpha (mean - M))",
        "Wu et al. 2024, arXiv:2407.08639",
        batchwise=True,
        running=Running(batchwise.initial_margin, batchwise.update_margin),
    ),
    # -- Pairs without a reference ----------------------------------------------------
    "simpo": Objective(
        reference_free.simpo,
        "-ls(beta (p_w/n_w - p_l/n_l - ratio))",
        "Meng et al. 2024, arXiv:2405.14734",
        needs=_NONE,
        learning_rate=6e-7,
        averages=True,
    ),
    "cpo": Objective(
        reference_free.cpo,
        "-ls(beta (p_w - p_l)) - alpha p_w per token",
        "Xu et al. 2024, arXiv:2401.08417",
        needs=_NONE,
    ),
    "cpo_simpo": Objective(
        reference_free.cpo_simpo,
        "SimPO - alpha p_w per token",
        "Xu et al. 2024, CPO_SIMPO",
        needs=_NONE,
        averages=True,
    ),
    "alphapo": Objective(
        reference_free.alphapo,
        "SimPO of (1 - exp(-alpha p/n)) / alpha",
        "Gupta et al. 2025, arXiv:2501.03884",
        needs=_NONE,
        learning_rate=7e-7,
        averages=True,
    ),
    "orpo": Objective(
        reference_free.orpo,
        "-p_w per token - beta ls(log odds_w - log odds_l)",
        "Hong et al. 2024, arXiv:2403.07691",
        needs=_NONE,
        learning_rate=8e-6,
        averages=True,
    ),
    "slic_hf": Objective(
        reference_free.slic_hf,
        "max(0, delta - p_w + p_l) - alpha p_w",
        "Zhao et al. 2023, arXiv:2305.10425",
        needs=_NONE,
    ),
    "rrhf": Objective(
        reference_free.rrhf,
        "max(0, p_l/n_l - p_w/n_w) - alpha p_w",
        "Yuan et al. 2023, arXiv:2304.05302",
        needs=_NONE,
        averages=True,
    ),
    "unlikelihood": Objective(
        reference_free.unlikelihood,
        "-p_w + alpha p_l",
        "Rafailov et al. 2023, section 6",
        needs=_NONE,
    ),
    # -- One completion ---------------------------------------------------------------
    "sft": Objective(
        likelihood.sft,
        "-p per token",
        "Ouyang et al. 2022, section 3.5",
        kind="single",
        needs=_NONE,
        learning_rate=2e-5,
    ),
    "npo": Objective(
        likelihood.npo,
        "-(2/beta) ls(-r), to forget",
        "Zhang et al. 2024, arXiv:2404.05868",
        kind="single",
        learning_rate=1e-5,
    ),
    "simnpo": Objective(
        likelihood.simnpo,
        "-(2/beta) ls(-beta p/n - gamma), to forget",
        "Fan et al. 2024, arXiv:2410.07163",
        kind="single",
        needs=_NONE,
        learning_rate=1e-5,
        averages=True,
    ),
    # -- Judged completions -----------------------------------------------------------
    "kto": Objective(
        judged.kto,
        "w_D s(beta z0 - r) if good, w_U s(r - beta z0) if bad",
        "Ethayarajh et al. 2024, arXiv:2402.01306",
        kind="judged",
        needs=("reference", "mismatched"),
        batchwise=True,
    ),
    "apo_zero_unpaired": Objective(
        judged.apo_zero_unpaired,
        "s(-r) if good, s(r) if bad",
        "D'Oosterlinck et al. 2024, arXiv:2408.06266",
        kind="judged",
        learning_rate=2e-7,
    ),
    "bco": Objective(
        judged.bco,
        "-ls(r - delta) if good, -ls(delta - r) if bad",
        "Jung et al. 2024, arXiv:2404.04656",
        kind="judged",
        learning_rate=5e-7,
        batchwise=True,
        running=Running(judged.initial_mean, judged.update_mean),
    ),
    # -- Ranked and scored completions ------------------------------------------------
    "plackett_luce": Objective(
        ranked.plackett_luce,
        "-sum_k log(exp r_k / sum_{j not better} exp r_j)",
        "Rafailov et al. 2023, appendix A.3",
        kind="ranked",
    ),
    "infonca": Objective(
        ranked.infonca,
        "-sum_k softmax(score/alpha)_k log softmax(r)_k",
        "Chen et al. 2024, arXiv:2402.05369",
        kind="ranked",
        learning_rate=5e-6,
    ),
    "nca": Objective(
        ranked.nca,
        "-sum_k (softmax(score/alpha)_k ls(r_k) + ls(-r_k)/K)",
        "Chen et al. 2024, arXiv:2402.05369",
        kind="ranked",
        learning_rate=5e-6,
    ),
    "exo": Objective(
        ranked.exo,
        "KL(softmax(r) ‖ softmax(score/alpha))",
        "Ji et al. 2024, arXiv:2402.00856",
        kind="ranked",
    ),
    "sppo": Objective(
        ranked.sppo,
        "sum_k (d_k - (P_k - 1/2)/beta)²",
        "Wu et al. 2024, arXiv:2405.00675",
        kind="ranked",
        learning_rate=5e-7,
    ),
    # -- Reward models ----------------------------------------------------------------
    "bradley_terry": Objective(
        reward_model.bradley_terry,
        "-ls(r_w - r_l - margin) + center (r_w + r_l)², r a scalar head's",
        "Ouyang et al. 2022, eq. 1",
        needs=("reward_head",),
        learning_rate=1e-5,
    ),
}

MIXTURES: dict[str, Mixture] = {
    "mpo": Mixture(
        "0.8*dpo+0.2*bco_pair+sft", {"beta": 0.1}, "Wang et al. 2024, arXiv:2411.10442"
    ),
    "rpo": Mixture("dpo+0.005*sft", {}, "Liu et al. 2024, arXiv:2405.16436"),
    "iterative_rpo": Mixture("dpo+sft", {}, "Pang et al. 2024, arXiv:2404.19733"),
}
