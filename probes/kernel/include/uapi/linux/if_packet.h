/* SPDX-License-Identifier: Apache-2.0 */
/* Opened by BCC, which uses nothing out of it here. */
