/* SPDX-License-Identifier: Apache-2.0 */
/* Any release from 4.8 on: below that, perf_submit() asks for the CPU number with a call of its own.
 * The running kernel's release is not meant; programs ask for features (see host/). */
#ifndef K8SDIAG_LINUX_VERSION_H
#define K8SDIAG_LINUX_VERSION_H
#define KERNEL_VERSION(major, minor, patch) (((major) << 16) + ((minor) << 8) + (patch))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 10, 0)
#endif
