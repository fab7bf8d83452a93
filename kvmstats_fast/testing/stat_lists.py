"""The statistics each architecture's KVM has: of the original patch series, and of today's x86.

Sources: the ``kvm_vm_stats_desc`` and ``kvm_vcpu_stats_desc`` arrays of "[PATCH v2 2/4] KVM: stats: Add fd-based API to
read binary stats data" (arch/*/kvm), and of arch/x86/kvm/x86.c in Linux 6.18.

A word is ``name``, ``name:MACRO`` (the kernel's ``STATS_DESC_MACRO``; COUNTER if none is given), and ``@offset`` where
a statistic's values do not follow those of the one before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvmstats_fast.abi import StatBase, StatType, StatUnit
from kvmstats_fast.stat import Stat

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

#: The kernel's STATS_DESC_* macros (``include/linux/kvm_host.h``) that the lists use.
_MACROS = {
    "COUNTER": Stat("", StatType.CUMULATIVE, StatUnit.NONE, StatBase.POW10, 0, 1, 0),
    "ICOUNTER": Stat("", StatType.INSTANT, StatUnit.NONE, StatBase.POW10, 0, 1, 0),
    "PCOUNTER": Stat("", StatType.PEAK, StatUnit.NONE, StatBase.POW10, 0, 1, 0),
    "IBOOLEAN": Stat("", StatType.INSTANT, StatUnit.BOOLEAN, StatBase.POW10, 0, 1, 0),
    "TIME_NSEC": Stat("", StatType.CUMULATIVE, StatUnit.SECONDS, StatBase.POW10, -9, 1, 0),
    "LOGHIST_TIME_NSEC": Stat("", StatType.LOG_HIST, StatUnit.SECONDS, StatBase.POW10, -9, 32, 0),
}

_VM_COMMON = "remote_tlb_flush "
_VCPU_COMMON = """
    halt_successful_poll halt_attempted_poll halt_poll_invalid halt_wakeup halt_poll_success_ns:TIME_NSEC
    halt_poll_fail_ns:TIME_NSEC
"""

#: Statistics that a kernel has only with a configuration option.
_OPTIONAL = {
    "CONFIG_KVM_MIPS_VZ": """
        vz_gpsi_exits vz_gsfc_exits vz_hc_exits vz_grr_exits vz_gva_exits vz_ghfc_exits vz_gpa_exits vz_resvd_exits
        vz_cpucfg_exits
    """,
    "CONFIG_CPU_LOONGSON64": "vz_cpucfg_exits",
}

#: Every option that adds statistics to some list.
OPTIONS = frozenset(_OPTIONAL)

#: The original series: (architecture, kind) to its list.
_SERIES = {
    ("arm64", "vm"): _VM_COMMON,
    ("arm64", "vcpu"): _VCPU_COMMON
    + """
        hvc_exit_stat wfe_exit_stat wfi_exit_stat mmio_exit_user mmio_exit_kernel exits
    """,
    ("mips", "vm"): _VM_COMMON,
    ("mips", "vcpu"): _VCPU_COMMON
    + """
        wait_exits cache_exits signal_exits int_exits cop_unusable_exits tlbmod_exits tlbmiss_ld_exits
        tlbmiss_st_exits addrerr_st_exits addrerr_ld_exits syscall_exits resvd_inst_exits break_inst_exits
        trap_inst_exits msa_fpe_exits fpe_exits msa_disabled_exits flush_dcache_exits vz_gpsi_exits
        vz_gsfc_exits vz_hc_exits vz_grr_exits vz_gva_exits vz_ghfc_exits vz_gpa_exits vz_resvd_exits
        vz_cpucfg_exits
    """,
    ("powerpc-book3s", "vm"): _VM_COMMON
    + """
        num_2M_pages:ICOUNTER num_1G_pages:ICOUNTER
    """,
    ("powerpc-book3s", "vcpu"): _VCPU_COMMON
    + """
        sum_exits mmio_exits signal_exits light_exits itlb_real_miss_exits itlb_virt_miss_exits
        dtlb_real_miss_exits dtlb_virt_miss_exits syscall_exits isi_exits dsi_exits emulated_inst_exits
        dec_exits ext_intr_exits halt_wait_ns:TIME_NSEC halt_successful_wait dbell_exits gdbell_exits ld st
        pf_storage pf_instruc sp_storage sp_instruc queue_intr ld_slow st_slow pthru_all pthru_host
        pthru_bad_aff
    """,
    ("powerpc-booke", "vm"): _VM_COMMON
    + """
        num_2M_pages:ICOUNTER num_1G_pages:ICOUNTER
    """,
    ("powerpc-booke", "vcpu"): _VCPU_COMMON
    + """
        sum_exits mmio_exits signal_exits light_exits itlb_real_miss_exits itlb_virt_miss_exits
        dtlb_real_miss_exits dtlb_virt_miss_exits syscall_exits isi_exits dsi_exits emulated_inst_exits
        dec_exits ext_intr_exits halt_wait_ns:TIME_NSEC halt_successful_wait dbell_exits gdbell_exits ld st
        pthru_all pthru_host pthru_bad_aff
    """,
    ("s390", "vm"): _VM_COMMON
    + """
        inject_io inject_float_mchk inject_pfault_done inject_service_signal inject_virtio
    """,
    ("s390", "vcpu"): _VCPU_COMMON
    + """
        exit_userspace exit_null exit_external_request exit_io_request exit_external_interrupt exit_stop_request
        exit_validity exit_instruction exit_pei halt_no_poll_steal instruction_lctl instruction_lctlg
        instruction_stctl instruction_stctg exit_program_interruption exit_instr_and_program
        exit_operation_exception deliver_ckc deliver_cputm deliver_external_call deliver_emergency_signal
        deliver_service_signal deliver_virtio deliver_stop_signal deliver_prefix_signal deliver_restart_signal
        deliver_program deliver_io deliver_machine_check exit_wait_state inject_ckc inject_cputm
        inject_external_call inject_emergency_signal inject_mchk inject_pfault_init inject_program
        inject_restart inject_set_prefix inject_stop_signal instruction_epsw instruction_gs instruction_io_other
        instruction_lpsw instruction_lpswe instruction_pfmf instruction_ptff instruction_sck instruction_sckpf
        instruction_stidp instruction_spx instruction_stpx instruction_stap instruction_iske instruction_ri
        instruction_rrbe instruction_sske instruction_ipte_interlock instruction_stsi instruction_stfl
        instruction_tb instruction_tpi instruction_tprot instruction_tsch instruction_sie instruction_essa
        instruction_sthyi instruction_sigp_sense instruction_sigp_sense_running instruction_sigp_external_call
        instruction_sigp_emergency instruction_sigp_cond_emergency instruction_sigp_start instruction_sigp_stop
        instruction_sigp_stop_store_status instruction_sigp_store_status instruction_sigp_store_adtl_status
        instruction_sigp_arch instruction_sigp_prefix instruction_sigp_restart instruction_sigp_init_cpu_reset
        instruction_sigp_cpu_reset instruction_sigp_unknown diagnose_10 diagnose_44 diagnose_9c
        diagnose_9c_ignored diagnose_258 diagnose_308 diagnose_500 diagnose_other pfault_sync
    """,
    ("x86", "vm"): _VM_COMMON
    + """
        mmu_shadow_zapped mmu_pte_write mmu_pde_zapped mmu_flooded mmu_recycled mmu_cache_miss
        mmu_unsync:ICOUNTER largepages:ICOUNTER nx_largepages_splits:ICOUNTER
        max_mmu_page_hash_collisions:ICOUNTER
    """,
    ("x86", "vcpu"): _VCPU_COMMON
    + """
        pf_fixed pf_guest tlb_flush invlpg exits io_exits mmio_exits signal_exits irq_window_exits
        nmi_window_exits l1d_flush halt_exits request_irq_exits irq_exits host_state_reload fpu_reload
        insn_emulation insn_emulation_fail hypercalls irq_injections nmi_injections req_event nested_run
    """,
}

#: Linux 6.18, x86.
_X86 = {
    "vm": """
        remote_tlb_flush remote_tlb_flush_requests mmu_shadow_zapped mmu_pte_write mmu_pde_zapped mmu_flooded
        mmu_recycled mmu_cache_miss mmu_unsync:ICOUNTER pages_4k:ICOUNTER pages_2m:ICOUNTER pages_1g:ICOUNTER
        nx_lpage_splits:ICOUNTER max_mmu_rmap_size:PCOUNTER@112 max_mmu_page_hash_collisions:PCOUNTER@104
    """,
    "vcpu": """
        halt_successful_poll halt_attempted_poll halt_poll_invalid halt_wakeup halt_poll_success_ns:TIME_NSEC
        halt_poll_fail_ns:TIME_NSEC halt_wait_ns:TIME_NSEC halt_poll_success_hist:LOGHIST_TIME_NSEC
        halt_poll_fail_hist:LOGHIST_TIME_NSEC halt_wait_hist:LOGHIST_TIME_NSEC blocking:IBOOLEAN pf_taken
        pf_fixed pf_emulate pf_spurious pf_fast pf_mmio_spte_created pf_guest tlb_flush invlpg exits io_exits
        mmio_exits signal_exits irq_window_exits nmi_window_exits l1d_flush halt_exits request_irq_exits
        irq_exits host_state_reload fpu_reload insn_emulation insn_emulation_fail hypercalls irq_injections
        nmi_injections req_event nested_run directed_yield_attempted directed_yield_successful
        preemption_reported preemption_other guest_mode:IBOOLEAN notify_window_exits
    """,
}

ARCHITECTURES = tuple(sorted({arch for arch, _ in _SERIES}))


def stats_of(arch: str, kind: str, *, merged: bool, options: Collection[str]) -> tuple[Stat, ...]:
    """Return the statistics of an architecture's VM or vCPU file: x86 after the merge is Linux 6.18, the rest v2."""
    words = (_X86[kind] if merged and arch == "x86" else _SERIES[arch, kind]).split()
    missing = {name for option, names in _OPTIONAL.items() if option not in options for name in names.split()}
    return placed(_stat(word) for word in words if word not in missing)


def placed(stats: Iterable[Stat]) -> tuple[Stat, ...]:
    """Return the statistics with offsets: one without (-1) follows the one before it."""
    result: list[Stat] = []
    for stat in stats:
        end = result[-1].offset + 8 * result[-1].size if result else 0
        result.append(replace(stat, offset=end) if stat.offset < 0 else stat)
    return tuple(result)


def _stat(word: str) -> Stat:
    head, _, offset = word.partition("@")
    name, _, macro = head.partition(":")
    return replace(_MACROS[macro or "COUNTER"], name=name, offset=int(offset or -1))
