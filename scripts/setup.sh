# shellcheck shell=sh disable=SC2154 # checkout and install are set by the script that sources this
# Prepares the machine for scripts/k8sdiag and scripts/test, which source this file (POSIX sh).
#
#   prepare KIND COMMANDS BCC
#     KIND      run | dev: which requirements of pyproject.toml the virtual environment holds
#     COMMANDS  programs that have to be on PATH, as COMMAND=PACKAGE words
#     BCC       yes | no: whether bcc's Python module has to be there
#   in:   checkout (absolute path), install (yes, or no after --no-install), failure_status (exit status)
#   out:  venv (directory of the virtual environment)
#
# What is there already is found without asking the package manager, so a second start costs a few
# hundredths of a second. What is missing is announced in one line on stderr and then installed; nothing
# that is on the node already is upgraded, removed or restarted.

say() { printf 'k8sdiag: %s\n' "$1" >&2; }

fail() {
    say "$1"
    exit "${failure_status:-1}"
}

# ---- what is here ---------------------------------------------------------------------------------

# Sets python and python_version ("3.11"). The distribution's own comes first: a pyenv or conda that
# happens to be on root's PATH today may be gone tomorrow.
choose_python() {
    for python in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        python_version=$("$python" -ISc '
import sys
print("%d.%d" % sys.version_info[:2])
sys.exit(sys.version_info < (3, 10))' 2>/dev/null) && return
    done
    python=
}

# Prints the requirements of KIND, one a line. pyproject.toml keeps them one a line for this.
requirements() {
    case $1 in dev) dev=p ;; *) dev= ;; esac
    sed -n '
        /^dependencies = \[/,/^\]/ s/^ *"\([^"]*\)".*/\1/p
        /^dev = \[/,/^\]/ { s/^ *"\([^"]*\)".*/\1/'"$dev"'
        }' "$checkout/pyproject.toml"
}

# Sets venv, stamp and lock. An environment is named after what is in it, so that two checkouts with the same
# pins share one, and changed pins make a new one while a running k8sdiag keeps the old.
choose_venv() {
    stamp=$({ echo "$1 $python_version"; requirements "$1"; } | sha256sum)
    stamp=${stamp%% *}
    if [ -n "${K8SDIAG_VENV:-}" ]; then
        venv=$K8SDIAG_VENV
        [ "$1" = run ] || venv=$venv-$1
        case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
        lock=$venv.lock
        return
    fi
    if [ "$uid" = 0 ]; then
        venv=/var/cache/k8sdiag
    elif [ -n "${XDG_CACHE_HOME:-}${HOME:-}" ]; then
        venv=${XDG_CACHE_HOME:-$HOME/.cache}/k8sdiag
    else
        fail 'neither HOME nor XDG_CACHE_HOME is set, so there is no place for the Python packages; set K8SDIAG_VENV to a directory to put them in'
    fi
    short=${stamp#????????????????}
    lock=$venv/lock
    venv=$venv/venv-$1-${stamp%"$short"}
}

# The stamp is written last, so an installation that was killed is done again; python is looked at too,
# because it is a link to one that may have been removed.
venv_ready() {
    [ -x "$venv/bin/python" ] && [ -r "$venv/$stamp_name" ] || return 1
    read -r found <"$venv/$stamp_name" || return 1
    [ "$found" = "$stamp" ]
}
stamp_name=k8sdiag-stamp

bcc_present() {
    for found in "${K8SDIAG_BCC_PATH:-/nonexistent}" /usr/lib/python3/dist-packages \
        /usr/lib/python3.*/site-packages /usr/lib64/python3.*/site-packages; do
        [ -e "$found/bcc/__init__.py" ] && return
    done
    return 1
}

# ---- packages of the distribution -----------------------------------------------------------------

package_tool() {
    for found in apt-get dnf; do
        command -v "$found" >/dev/null && echo "$found" && return
    done
    echo none
}

# Ubuntu before 25.04 has bpftool among the tools of each kernel, behind a common wrapper.
bpftool_packages() {
    found=$(sed -n 's/^\(ID\|VERSION_ID\)="\{0,1\}\([^"]*\)"\{0,1\}$/\1=\2/p' /etc/os-release | sort | paste -sd ' ' -)
    case $found in
    ID=ubuntu\ VERSION_ID=2[0-4].*) printf '%s\n' linux-tools-common "linux-tools-$(uname -r)" ;;
    *) echo bpftool ;;
    esac
}

# Prints the packages that are missing for: COMMANDS, bcc, and (when the environment is to be built)
# Python with the venv module.
missing_packages() {
    for pair in $1; do
        command -v "${pair%%=*}" >/dev/null && continue
        case $pair in
        bpftool=*) bpftool_packages ;;
        *) echo "${pair#*=}" ;;
        esac
    done
    if [ "$2" = yes ] && ! bcc_present; then
        case $tool in apt-get) echo python3-bpfcc ;; *) echo python3-bcc ;; esac
    fi
    venv_ready && return
    if [ -z "$python" ]; then
        case $tool in
        apt-get) printf '%s\n' python3 python3-venv ;;
        *) echo python3.11 ;; # RHEL 9 and Amazon Linux 2023 have 3.9 as python3 and this beside it
        esac
    elif ! "$python" -ISc 'import ensurepip, venv' 2>/dev/null; then
        case $python in /usr/bin/python3) echo python3-venv ;; *) echo "python$python_version-venv" ;; esac
    fi
}

install_command() {
    case $tool in
    apt-get) echo "apt-get install --no-install-recommends --no-upgrade $1" ;;
    dnf) echo "dnf install --setopt=install_weak_deps=False $1" ;;
    *) echo "the package manager of this distribution for: $1" ;;
    esac
}

# apt_get WORDS… : the way apt-get is called throughout. needrestart is suspended: by default it would
# restart services on Ubuntu. On a fresh machine unattended-upgrades often holds the lock.
apt_get() {
    LC_ALL=C DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 APT_LISTCHANGES_FRONTEND=none \
        apt-get -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@" </dev/null 9>&-
}

# The transaction for PACKAGES as the package manager words it, without doing it.
plan() {
    case $tool in
    apt-get)
        # shellcheck disable=SC2086 # a list of words
        apt_get install --print-uris --no-install-recommends --no-upgrade --no-remove \
            -o Debug::NoLocking=1 $1 2>&1
        ;;
    dnf)
        # shellcheck disable=SC2086
        LC_ALL=C dnf install --assumeno --setopt=install_weak_deps=False $1 2>&1 </dev/null 9>&-
        ;;
    esac
}

# Sets size: "23 packages, 60.2 MB to download, 290 MB on disk" from the plan's text, and refuses a plan
# that would change what is installed.
judge_plan() {
    case $tool in
    apt-get)
        changed=$(printf '%s\n' "$1" | sed -n \
            's/^\([0-9]*\) upgraded, [0-9]* newly installed,\( [0-9]* downgraded,\)\{0,1\} \([0-9]*\) to remove.*/\1 \3/p')
        count=$(printf '%s\n' "$1" | sed -n 's/^[0-9]* upgraded, \([0-9]*\) newly installed.*/\1/p')
        download=$(printf '%s\n' "$1" | sed -n 's/^Need to get \(.*\) of archives.*/\1/p')
        disk=$(printf '%s\n' "$1" | sed -n 's/^After this operation, \(.*\) of additional.*/\1/p')
        [ -n "$count" ] || return 1
        [ "$changed" = '0 0' ] || fail "installing $packages would upgrade or remove packages of this node, which k8sdiag never does; look at it and decide: $(install_command "$packages")"
        ;;
    dnf)
        count=$(printf '%s\n' "$1" | sed -n 's/^Install  *\([0-9]*\) Package.*/\1/p')
        download=$(printf '%s\n' "$1" | sed -n 's/^Total download size: //p')
        disk=$(printf '%s\n' "$1" | sed -n 's/^Installed size: //p')
        [ -n "$count" ] || return 1
        ! printf '%s\n' "$1" | grep -Eq '^(Upgrade|Downgrade|Remove) +[0-9]+ Package' ||
            fail "installing $packages would upgrade or remove packages of this node, which k8sdiag never does; look at it and decide: $(install_command "$packages")"
        ;;
    esac
    size="$count packages, ${download:-?} to download, ${disk:-?} on disk"
}

why_not() { # the last complaint in the log, for the message
    grep -E '^(E:|W: Failed|ERROR|Error|error|No match)' "$log" | tail -n 1
}

install_packages() {
    case $tool in
    apt-get)
        # shellcheck disable=SC2086
        set -- install --yes -qq --no-install-recommends --no-upgrade --no-remove $packages
        # the second try is for package lists that are older than what the mirror still holds
        apt_get "$@" >"$log" 2>&1 || { apt_get update -qq >>"$log" 2>&1 && apt_get "$@" >>"$log" 2>&1; }
        ;;
    dnf)
        # shellcheck disable=SC2086
        dnf install --assumeyes --quiet --setopt=install_weak_deps=False $packages >"$log" 2>&1 </dev/null 9>&-
        ;;
    esac
}

# ---- the virtual environment ----------------------------------------------------------------------

# Built in place, because scripts inside name their own path. The stamp file is there from the first
# moment (it then says "building"), so that a directory somebody else made is never cleared.
build_venv() {
    rm -rf "$venv" && mkdir -p "$venv" && echo building >"$venv/$stamp_name" || return 1
    requirements "$1" >"$venv/requirements.txt"
    "$python" -m venv "$venv" >>"$log" 2>&1 || return 1
    # Wheels only: a node has no compiler, and "no wheel for this machine" is the clearer message.
    # On a node no cache: nothing is written outside the directory that was announced.
    cache=
    [ "$1" != run ] || cache=--no-cache-dir
    # shellcheck disable=SC2086 # no word when empty
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet --no-input --only-binary :all: $cache \
        --requirement "$venv/requirements.txt" >>"$log" 2>&1 </dev/null || return 1
    echo "$stamp" >"$venv/$stamp_name"
}

# Measured with pip 23.2 on Python 3.11, x86-64; includes pip itself, which stays in the environment.
venv_size() {
    case $1 in
    run) echo 'about 4 MB to download, 50 MB on disk' ;;
    *) echo 'about 36 MB to download, 180 MB on disk' ;;
    esac
}

# Root leaves no caches in a checkout of somebody else, who could not delete them.
checkout_is_ours() { [ "$(stat -c %u "$checkout")" = "$uid" ]; }

# ---- all of it ------------------------------------------------------------------------------------

prepare() {
    uid=$(id -u)
    choose_python
    choose_venv "$1"
    lacking=
    for pair in $2; do
        command -v "${pair%%=*}" >/dev/null || lacking=yes
    done
    if [ "$3" = yes ] && ! bcc_present; then lacking=yes; fi
    if [ -z "$lacking" ] && venv_ready; then return; fi
    prepare_slowly "$@"
}

prepare_slowly() {
    tool=$(package_tool)
    packages=$(missing_packages "$2" "$3" | sort -u | paste -sd ' ' -)
    pip_packages=
    venv_ready || pip_packages=$(requirements "$1" | sed 's/;.*//' | paste -sd ' ' -)

    if [ "$install" = no ]; then
        say 'not ready, and --no-install forbids to install what is missing:'
        [ -z "$packages" ] || say "  packages of the distribution: $packages    ($(install_command "$packages"))"
        [ -z "$pip_packages" ] || say "  Python packages for $venv: $pip_packages"
        exit "$failure_status"
    fi
    if [ -n "$packages" ] && [ "$uid" != 0 ]; then
        fail "this machine lacks $packages, and only root may install packages: sudo $(install_command "$packages")"
    fi
    if [ -n "$packages" ] && [ "$tool" = none ]; then
        fail "this machine lacks $packages, and there is neither apt-get nor dnf to install it with: use $(install_command "$packages")"
    fi
    if [ -e "$venv" ] && [ ! -e "$venv/$stamp_name" ] && [ -n "$(ls -A "$venv")" ]; then
        fail "$venv is not empty and was not made by k8sdiag, so it is left alone; set K8SDIAG_VENV to another directory"
    fi
    { mkdir -p "${lock%/*}" && : >>"$lock"; } 2>/dev/null ||
        fail "cannot write to ${lock%/*}, where the Python packages are to go; set K8SDIAG_VENV to a directory that can be written"

    # One start installs, another one that comes meanwhile waits and then finds everything there.
    exec 9>"$lock"
    flock -n 9 || { say 'waiting for another start that is installing' && flock 9; }
    choose_python
    choose_venv "$1"
    venv_ready && pip_packages=
    packages=$(missing_packages "$2" "$3" | sort -u | paste -sd ' ' -)

    log=${lock%lock}install.log
    : >"$log"
    line=
    if [ -n "$packages" ]; then
        offer=$(plan "$packages") || : # judge_plan tells
        if ! judge_plan "$offer" && [ "$tool" = apt-get ]; then
            apt_get update -qq >"$log" 2>&1 || :
            offer=$(plan "$packages") || : # judge_plan tells
        fi
        judge_plan "$offer" || {
            printf '%s\n' "$offer" >>"$log"
            fail "cannot install $packages: $(why_not). Is there a network, and are the distribution's package sources complete (on Ubuntu: universe)? Otherwise install by hand: $(install_command "$packages")"
        }
        case $count in
        0) packages= ;; # installed, but not where it is looked for: the verb says what it misses
        *) line="$packages ($tool: $size, below /usr)" ;;
        esac
    fi
    if [ -n "$pip_packages" ]; then
        where=$venv
        [ -n "$python" ] || where=${lock%/*} # the full name depends on the Python that is to come
        line="$line${line:+ and }Python packages $pip_packages (pip: $(venv_size "$1"), in $where)"
    fi
    [ -z "$line" ] || say "installing once: $line"

    umask 022
    if [ -n "$packages" ]; then
        install_packages ||
            fail "could not install $packages: $(why_not) (all of it: $log). Without network, install by hand: $(install_command "$packages")"
        [ -n "$python" ] || choose_python
        [ -n "$python" ] || fail 'no Python 3.10 or newer was found; install one'
    fi
    if [ -n "$pip_packages" ]; then
        # python may have been chosen just now, and with it the name of the environment
        choose_venv "$1"
        build_venv "$1" ||
            fail "could not install the Python packages $pip_packages: $(why_not) (all of it: $log). Without network: fetch them elsewhere with 'pip download -d DIR …' for Python $python_version, copy DIR here, and start with PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR in the environment (sudo env PIP_NO_INDEX=1 …)"
    fi
    rm -f "$log"
    exec 9>&-
}
