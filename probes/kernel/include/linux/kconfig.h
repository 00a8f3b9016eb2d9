/* SPDX-License-Identifier: Apache-2.0 */
/* BCC forces this file into every compile, and its helpers.h refuses to go on without the constant. */
#ifndef CONFIG_BPF_SYSCALL
#define CONFIG_BPF_SYSCALL 1
#endif
