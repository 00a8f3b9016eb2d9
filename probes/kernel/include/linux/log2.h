/* SPDX-License-Identifier: Apache-2.0 */
/* BPF_STACK_TRACE rounds its size up with this; a constant expression for n >= 2. */
#ifndef K8SDIAG_LINUX_LOG2_H
#define K8SDIAG_LINUX_LOG2_H
#define roundup_pow_of_two(n) (1ULL << (64 - __builtin_clzll((n) - 1ULL)))
#endif
