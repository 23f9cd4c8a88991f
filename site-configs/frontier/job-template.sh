#!/bin/bash
# Filled by the site's agent for each BatchJob and submitted by deephyper_balsam.sites.slurm.SlurmScheduler, which gives
# --partition, --account, --nodes, --time, --job-name and --output on sbatch's command line.
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
{% if wall_time_min > 3 -%}
# Slurm signals up to a minute early: 60 to 120 s are left to hand the runs back
#SBATCH --signal=B:TERM@60
{% endif -%}
{% if optional_params.get("reservation") -%}
#SBATCH --reservation={{ optional_params["reservation"] }}
{% endif -%}
{% if optional_params.get("qos") -%}
#SBATCH --qos={{ optional_params["qos"] }}
{% endif -%}
{%- set search = optional_params.get("search") -%}
{%- macro q(text) -%}'{{ (text | string) | replace("'", "'\\''") }}'{%- endmacro %}
# The Python of the site's agent, and the Balsam that it is logged in to
export BALSAM_SITE_PATH={{ q(balsam_site_path) }}
cd "$BALSAM_SITE_PATH" || exit 1
python="${DEEPHYPER_BALSAM_PYTHON:-{{ launcher_cmd.split(" /")[0] }}}"

# Lines of your own go here: module load, proxies, variables that your run function needs
# For a Balsam server outside of the facility: export https_proxy=http://proxy.ccs.ornl.gov:3128/

# exec: a signal to the job reaches the launcher itself, which stops its runs in order. Balsam's own launcher takes two
# minutes off the wall time that it is given; it is given all of it.
exec "$python" -m deephyper_balsam.launcher.{{ "inside" if search else "main" }} \
    -j {{ (job_mode | string) | replace("JobMode.", "") }} -t {{ wall_time_min }}
    {%- for key, value in (filter_tags or {}).items() %} --tag {{ q(key ~ "=" ~ value) }}{% endfor %}
    {%- for part in (partitions or "").split(" --part ")[1:] %} --part {{ q(part | replace("JobMode.", "")) }}{% endfor %}
    {%- if search %} --chain {{ optional_params.get("chain") or 0 }} {{ q(search) }}{% endif %}
