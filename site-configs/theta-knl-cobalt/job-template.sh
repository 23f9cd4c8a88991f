#!/bin/bash
# Filled by the site's agent for each BatchJob and submitted by deephyper_balsam.sites.cobalt.CobaltScheduler, which gives
# -A, -q, -n, -t, --jobname, --env and -O on qsub's command line.
#COBALT --attrs ssds=required:ssd_size=128:filesystems=home,grand,eagle,theta-fs0
{%- set search = optional_params.get("search") -%}
{%- macro q(text) -%}'{{ (text | string) | replace("'", "'\\''") }}'{%- endmacro %}
# The Python of the site's agent, and the Balsam that it is logged in to
export BALSAM_SITE_PATH={{ q(balsam_site_path) }}
cd "$BALSAM_SITE_PATH" || exit 1
python="${DEEPHYPER_BALSAM_PYTHON:-{{ launcher_cmd.split(" /")[0] }}}"

# Lines of your own go here: module load, proxies, variables that your run function needs
# As in Balsam's own template for this machine: the proxy is for an API outside of the facility
export https_proxy=http://theta-proxy.tmi.alcf.anl.gov:3128
module unload trackdeps darshan xalt 2>/dev/null || true
export PMI_NO_FORK=1
{% if optional_params.get("singularity_prime_cache") in ("yes", "1", "true") %}aprun -N 1 -n "$COBALT_JOBSIZE" /soft/tools/prime-cache; sleep 10
{% endif -%}

# exec: a signal to the job reaches the launcher itself, which stops its runs in order. Balsam's own launcher takes two
# minutes off the wall time that it is given; it is given all of it.
exec "$python" -m deephyper_balsam.launcher.{{ "inside" if search else "main" }} \
    -j {{ (job_mode | string) | replace("JobMode.", "") }} -t {{ wall_time_min }}
    {%- for key, value in (filter_tags or {}).items() %} --tag {{ q(key ~ "=" ~ value) }}{% endfor %}
    {%- for part in (partitions or "").split(" --part ")[1:] %} --part {{ q(part | replace("JobMode.", "")) }}{% endfor %}
    {%- if search %} --chain {{ optional_params.get("chain") or 0 }} {{ q(search) }}{% endif %}
