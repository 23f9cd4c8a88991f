#!/bin/bash
# Filled by the site's agent for each BatchJob and submitted by deephyper_balsam.sites.pbs.PBSScheduler, which gives -A, -q,
# -N, -v, -o and -j on qsub's command line.
#PBS -l select={{ num_nodes }}:system=aurora
#PBS -l place=scatter:excl
#PBS -l walltime={{ "%02d:%02d:00" | format(wall_time_min // 60, wall_time_min % 60) }}
#PBS -l filesystems=home:flare
{%- set search = optional_params.get("search") -%}
{%- macro q(text) -%}'{{ (text | string) | replace("'", "'\\''") }}'{%- endmacro %}
# The Python of the site's agent, and the Balsam that it is logged in to
export BALSAM_SITE_PATH={{ q(balsam_site_path) }}
cd "$BALSAM_SITE_PATH" || exit 1
python="${DEEPHYPER_BALSAM_PYTHON:-{{ launcher_cmd.split(" /")[0] }}}"

# Lines of your own go here: module load, proxies, variables that your run function needs
# ALCF's proxy, by which compute nodes reach an API outside of the facility; what is inside is reached without it
export http_proxy="http://proxy.alcf.anl.gov:3128" https_proxy="http://proxy.alcf.anl.gov:3128"
export no_proxy="localhost,127.0.0.1,*.alcf.anl.gov,.alcf.anl.gov" NO_PROXY="localhost,127.0.0.1,*.alcf.anl.gov,.alcf.anl.gov"

# exec: a signal to the job reaches the launcher itself, which stops its runs in order. Balsam's own launcher takes two
# minutes off the wall time that it is given; it is given all of it.
exec "$python" -m deephyper_balsam.launcher.{{ "inside" if search else "main" }} \
    -j {{ (job_mode | string) | replace("JobMode.", "") }} -t {{ wall_time_min }}
    {%- for key, value in (filter_tags or {}).items() %} --tag {{ q(key ~ "=" ~ value) }}{% endfor %}
    {%- for part in (partitions or "").split(" --part ")[1:] %} --part {{ q(part | replace("JobMode.", "")) }}{% endfor %}
    {%- if search %} --chain {{ optional_params.get("chain") or 0 }} {{ q(search) }}{% endif %}
